"""Rows that are one sample each, as transformers finds it without asking the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

_LOOKED_FOR = "find_packed_sequence_indices"


@contextmanager
def unbroken_rows(batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Where a batch has no ``position_ids``, the positions that a decoder counts itself are not searched for breaks.

    transformers (5.x) compares them on the GPU and waits for the answer before the first layer: the host, which would
    be launching it, begins then, and the GPU has nothing to do for 1.3 ms a step (an H200, 450 ms in all; for four
    layers of QAT 72).
    """
    if "position_ids" in batch:
        yield
        return
    with looked_for(lambda position_ids: None):  # what its own gives for positions that only rise by one
        yield


@contextmanager
def looked_for(answer: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Breaks in positions are ``answer``'s, where this version of transformers looks for them."""
    own = getattr(masking_utils, _LOOKED_FOR, None)
    if own is None:
        yield
        return
    setattr(masking_utils, _LOOKED_FOR, answer)
    try:
        yield
    finally:
        setattr(masking_utils, _LOOKED_FOR, own)
