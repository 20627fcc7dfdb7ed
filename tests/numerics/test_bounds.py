"""Ranges that a function has by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qtrain.errors import ConfigError
from qtrain.numerics.bounds import bounds_of


@pytest.mark.parametrize(
    ("name", "function", "span"), [("sigmoid", torch.sigmoid, 1.0), ("tanh", torch.tanh, 2.0)], ids=["sigmoid", "tanh"]
)
def test_beyond_the_known_inputs_the_output_changes_by_less_than_a_code(
    name: str, function: Callable[[torch.Tensor], torch.Tensor], span: float
) -> None:
    known = bounds_of(name)
    assert known.input is not None
    low, high = (float(function(torch.tensor(end))) for end in known.input)
    assert low - known.output[0] < span / 255
    assert known.output[1] - high < span / 255
    assert known.input == {"sigmoid": (-6.0, 6.0), "tanh": (-3.0, 3.0)}[name]


def test_known_outputs_and_the_nearest_name() -> None:
    assert bounds_of("softmax") == (None, (0.0, 1.0))
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        bounds_of("sigmod")
