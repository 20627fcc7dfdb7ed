"""An entry of a checkpoint's weights whose name is a sentence: loaded without what it names, torch prints it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from qtrain.errors import CheckpointError

SENTENCE = "this checkpoint is quantized: add qtrain.callbacks."
WAY_OUT = " to the trainer's callbacks, or call its prepare(module) before load_state_dict"


def call(name: str, options: Mapping[str, Any]) -> str:
    """The code that makes an object of that class with these literals: ``Name(weight={'format': 'int4'})``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def mark(state_dict: MutableMapping[str, Any], made_by: str, step: int) -> None:
    """Add the entry; its value is the step.

    Args:
        made_by: the call that quantizes the module, of literals.
    """
    state_dict[f"{SENTENCE}{made_by}{WAY_OUT}"] = torch.tensor(step)


def take_mark(state_dict: MutableMapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], int] | None:
    """Remove the entry; (options of the call, step), or None where there is no such entry.

    Raises:
        CheckpointError: it is no call of literals; nothing of it is run.
    """
    start = prefix + SENTENCE
    found = next((key for key in state_dict if key.startswith(start)), None)
    if found is None:
        return None
    step: Tensor = state_dict.pop(found)
    try:
        made_by = ast.parse(found.removeprefix(start).removesuffix(WAY_OUT), mode="eval").body
        if not isinstance(made_by, ast.Call) or not isinstance(made_by.func, ast.Name) or made_by.args:
            raise ValueError("no call by keywords")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in made_by.keywords}, int(step)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"its mark cannot be read: {error}",
            where=f"checkpoint: {found[:100]}",
            rule="it says how it was quantized, as a call of literals",
            fix="save it again with QuantizationAwareTraining among the trainer's callbacks",
        ) from None
