"""Rows that have nothing to do with one another, a few at a time: in a core's cache, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PART = 2**20
"""Numbers of a part, 4 MB of fp32: what is written between two passes is still in a cache. Whole layers at a
time, half of each pass is page faults of its result (AMD EPYC: 3.3 ns a weight to quantize, 0.5 in parts)."""
WORKERS = 4
"""Parts at a time; more threads share the passes of each. Every pass takes Python's lock twice: sixteen parts of 2**19
at a time were quantized at 243 MB/s, four at 613 to 822 (Intel Xeon, 16 cores; one at a time on one core 318)."""
DEVICE_PART = 2**24
"""On a GPU, where it only bounds the memory."""


def over_rows(work: Callable[[slice], T], x: Tensor) -> list[T]:
    """``work`` of all rows of x [rows, columns] in turn, part by part; on a CPU on as many cores as torch has threads.

    torch's own threads wait for one another after every pass, and on busy cores that is most of the time; these do not,
    as long as there are no more than ``WORKERS``.
    """
    rows, columns = x.shape[0], max(1, x[:1].numel())
    on_cpu = x.device.type == "cpu"
    step = max(1, (PART if on_cpu else DEVICE_PART) // columns)
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    threads = torch.get_num_threads()
    if len(parts) < 2 or threads < 2 or not on_cpu:
        return [work(part) for part in parts]
    # As many cores as can be shared out evenly: 6 are three of two, not four of one.
    workers = max(range(2, min(threads, WORKERS) + 1), key=lambda few: (threads // few * few, few))
    torch.set_num_threads(threads // workers)  # new threads begin with as many
    try:
        pool = _pool(workers, threads // workers)
        begun = [pool.submit(_like(work), part) for part in parts]
        try:
            wait(begun)  # where one fails too: none goes on behind the back of who reports it
        except BaseException:  # a key, a signal
            for one in begun:
                one.cancel()
            wait(begun)
            raise
        return [one.result() for one in begun]
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(workers: int, each: int) -> ThreadPoolExecutor:
    """Threads that stay, by how many of torch's own each of them has.

    The C library gives each new thread any of its heaps, and all of them had grown to what one needs: 0.8 GB more
    (glibc 2.36, 16 threads) where each layer had threads of its own.
    """
    return ThreadPoolExecutor(workers, thread_name_prefix="qtrain-rows")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along


def all_rows(work: Callable[[slice], Tensor], shape: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` whose rows ``work`` computes, like ``over_rows``, in the dtype and where it gives them."""
    x = work(slice(0, 1)).new_empty(shape)
    over_rows(lambda rows: x[rows].copy_(work(rows)), x)
    return x


def _like(work: Callable[[slice], T]) -> Callable[[slice], T]:
    """``work`` with gradients off where they are off here: each thread has a switch of its own."""
    enabled = torch.is_grad_enabled()

    def run(part: slice) -> T:
        with torch.set_grad_enabled(enabled):
            return work(part)

    return run
