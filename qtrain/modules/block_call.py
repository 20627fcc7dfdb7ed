"""Which calls of a layer its block answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def block_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """x where a block is for this call: gradients are asked for, no compiler looks on, x is all that is given.

    With a keyword, or more than x, a layer's own forward knows what is meant.
    """
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    return args[0] if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
