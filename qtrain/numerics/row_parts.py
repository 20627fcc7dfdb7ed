"""Rows that have nothing to do with one another, a few at a time: in a core's cache, on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PART = 2**19
"""Numbers of a part, 2 MB of fp32: what is written between two passes is still in a cache. Whole layers at a
time, half of each pass is page faults of its result (AMD EPYC: 3.3 ns a weight to quantize, 0.5 in parts)."""
DEVICE_PART = 2**24
"""On a GPU, where it only bounds the memory."""


def over_rows(work: Callable[[slice], T], x: Tensor) -> list[T]:
    """``work`` of all rows of x [rows, columns] in turn, part by part; on a CPU by as many threads as torch has.

    torch's own threads wait for one another after every pass, and on busy cores that is most of the time; these do not.
    """
    rows, columns = x.shape[0], max(1, x[:1].numel())
    on_cpu = x.device.type == "cpu"
    step = max(1, (PART if on_cpu else DEVICE_PART) // columns)
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    threads = torch.get_num_threads()
    if len(parts) < 2 or threads < 2 or not on_cpu:
        return [work(part) for part in parts]
    torch.set_num_threads(1)  # new threads begin with as many
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(_like(work), parts))
    finally:
        torch.set_num_threads(threads)


def _like(work: Callable[[slice], T]) -> Callable[[slice], T]:
    """``work`` with gradients off where they are off here: each thread has a switch of its own."""
    enabled = torch.is_grad_enabled()

    def run(part: slice) -> T:
        with torch.set_grad_enabled(enabled):
            return work(part)

    return run
