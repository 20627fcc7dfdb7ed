"""A kernel beside its plain twin, torch.compile of that, peers and a copy: what is timed, and how."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FLUSHED = 2**29
"""Bytes that are written before each run: ten times an H200's L2, and 0.1 ms in which the host runs ahead."""
WARM, LEAST, MOST, SPENT = 3, 5, 20, 0.2
"""Runs that do not count; those that do, as many as take so many seconds."""
Run = Callable[[], object]


class NotHere(Exception):
    """This way cannot run on this machine, and why."""


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    tokens: int = 8192
    hidden: int = 4096
    intermediate: int = 11008
    vocab: int = 32000
    head: int = 128


TINY = Sizes(20, 64, 96, 300, 16)


@dataclass
class Case:
    """One kernel on one input. Whatever writes over its operands has some of its own, for its first run is compared.

    Attributes:
        what: it does, and on which shape.
        moved: bytes that have to be read and written.
        flops: of a product, whose rate is then given in place of bytes.
        kernel: makes the run; raises NotHere or ImportError where there is none.
        compiled: time torch.compile of the plain twin too.
        peers: by name, made as ``kernel`` is.
    """

    what: str
    moved: int
    kernel: Callable[[], Run]
    plain: Run
    flops: int = 0
    compiled: bool = True
    peers: Mapping[str, Callable[[], Run]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A row of the table.

    Attributes:
        apart: norm of what it gives less what the plain twin gives, over that of the latter.
        why: it did not run.
        broken: ours, though the machine has all that it needs.
    """

    way: str
    ms: float | None = None
    apart: float | None = None
    why: str = ""
    broken: bool = False


def tiles(name: str) -> Any:
    """A module of kernels in Triton.

    Raises:
        NotHere: nothing runs them here.
    """
    if not (ON_GPU or INTERPRETED):
        raise NotHere("the kernel in Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)")
    return importlib.import_module(f"qtrain.kernels.{name}")


def only_on_a_gpu() -> None:
    """Of peers.

    Raises:
        NotHere: there is none.
    """
    if not ON_GPU:
        raise NotHere("needs a GPU")


def measured(case: Case, compiles: bool = ON_GPU) -> Iterator[Found]:
    """The kernel, its plain twin, that one compiled, peers and a copy of as many bytes."""
    ways: dict[str, Callable[[], Run]] = {"kernel": case.kernel, "plain": lambda: case.plain}
    if case.compiled and compiles:
        ways["plain, torch.compile"] = lambda: torch.compile(lambda: case.plain(), dynamic=False)
    wanted = _tensors(case.plain())
    for way, make in {**ways, **case.peers, "a copy of as many bytes": lambda: copy_of(case.moved)}.items():
        ours = way in ("kernel", "plain")
        try:
            run = make()
            given = _tensors(run())
            apart = _apart(given, wanted) if way == "kernel" else None
            del given
            yield Found(way, milliseconds(run), apart)
        except (NotHere, ImportError) as why:
            yield Found(way, why=f"not here: {why}")
        except Exception as error:  # one that fails leaves the others their rows
            yield Found(way, why=f"failed: {type(error).__name__}: {error}", broken=ours)


def milliseconds(run: Run) -> float:
    """Median of the GPU's own time, with nothing of the operands in its L2; without one, of a single run."""
    if not ON_GPU:
        return _host_ms(run)
    slowest = max(_gpu_ms(run, WARM))
    return statistics.median(_gpu_ms(run, min(MOST, max(LEAST, int(1e3 * SPENT / slowest)))))


def copy_of(moved: int) -> Run:
    """A copy that reads half of these bytes and writes half."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gpu_ms(run: Run, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        _flushed().zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)


def _host_ms(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _tensors(given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [one for part in given for one in _tensors(part)] if isinstance(given, tuple | list) else []


def _apart(given: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(given) == len(wanted), (len(given), len(wanted))
    shares = []
    for one, other in zip(given, wanted, strict=True):
        size = float(other.float().norm())
        assert one.shape == other.shape and math.isfinite(size), (one.shape, other.shape, size)
        shares.append(float((one.float() - other.float()).norm()) / (size or 1.0))
    return max(shares)
