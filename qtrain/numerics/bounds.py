"""Ranges known in advance, from the function that follows or went before: nothing need be observed."""

from __future__ import annotations

from typing import NamedTuple

from qtrain.registry import Registry

Bounds = tuple[float, float]


class FunctionBounds(NamedTuple):
    """(low, high) of a function's argument and of its value.

    Attributes:
        input: None where the function is flat nowhere.
        output: all that it can return.
    """

    input: Bounds | None
    output: Bounds


# Inputs beyond the bounds change the output by less than one of its int8 codes:
# 1 - sigmoid(6) = 0.0025 < 1 / 255, 1 - tanh(3) = 0.0049 < 2 / 255.
FUNCTIONS: Registry[FunctionBounds] = Registry(
    "function of known bounds",
    {
        "sigmoid": FunctionBounds(input=(-6.0, 6.0), output=(0.0, 1.0)),
        "tanh": FunctionBounds(input=(-3.0, 3.0), output=(-1.0, 1.0)),
        "softmax": FunctionBounds(input=None, output=(0.0, 1.0)),
    },
)


def bounds_of(function: str) -> FunctionBounds:
    """The known ranges of that function; an unknown name is a ConfigError with the nearest known one."""
    return FUNCTIONS.get(function)
