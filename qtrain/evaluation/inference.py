"""Forward passes that leave no trace: no graph, no dropout, and the model's modes as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]
"""Token ids [B, L] to logits [B, L, V]."""

CHUNK_ELEMENTS = 2**24
"""Logits that are widened to fp32 at a time: 64 MiB, 341 positions of a 49,152-token vocabulary."""


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back (some stay frozen in eval).

    ``no_grad`` and not ``inference_mode``: tables that a layer caches on its first call (rotary angles, masks) would
    be inference tensors, which autograd refuses when training goes on.
    """
    modes = {module: module.training for model in models if isinstance(model, nn.Module) for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(model: nn.Module | Logits, ids: Tensor) -> Tensor:
    """Logits [B, L, V] for ids [B, L]: of a transformers (or PEFT) causal LM, or of a function ``ids -> logits``."""
    if not isinstance(model, nn.Module):
        return model(ids)
    ids = ids.to(device_of(model))
    output: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return output


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its ids: the device of its first parameter."""
    return next(model.parameters()).device


def position_chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover ``positions`` rows of logits, each at most ``CHUNK_ELEMENTS`` elements (one row at least)."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for begin in range(0, positions, size):
        yield slice(begin, begin + size)
