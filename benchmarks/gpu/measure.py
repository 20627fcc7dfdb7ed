"""What every case does: take its arguments, time its steps, print its line."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape

PREFIX = "RESULT "
PACKAGES = (
    *("qtrain", "torch", "triton", "transformers", "peft", "bitsandbytes", "lightning", "liger-kernel"),
    *("unsloth", "trl", "datasets"),
)


class NotHere(Exception):
    """A case cannot run on this machine, and why."""


@dataclass(frozen=True)
class Sizes:
    """Of a run: rows of a micro-batch, tokens of a row, steps that count and those before them.

    Attributes:
        together: steps of a measurement. Training does not wait for the GPU after each: the host begins the next one
            while the optimizer of the last runs.
    """

    rows: int = 4
    length: int = 2048
    warm: int = 3
    steps: int = 12
    together: int = 4


@dataclass
class Figures:
    """What a case found.

    Attributes:
        flops_per_token: by the frozen-base formula; 0 where it does not apply.
        said: what the run tells of its active kernels.
        more: other figures, by name.
    """

    tokens_per_second: float
    peak_gib: float | None
    flops_per_token: int
    said: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


Case = Callable[[argparse.Namespace], Figures]


def arguments(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """``CASE [--tiny] [--work DIR]``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if names := list(cases):
        parser.add_argument("case", choices=names)
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps, on any device")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qtrain-bench")
    return parser


def shape_of(shape: Shape, asked: argparse.Namespace) -> Shape:
    """The shape, or its tiny likeness."""
    return shape.tiny() if asked.tiny else shape


def sizes(asked: argparse.Namespace) -> Sizes:
    """4 x 2048 tokens, 12 steps after 3, measured by fours; or 2 x 64, 2 after 1."""
    return Sizes(2, 64, 1, 2, 2) if asked.tiny else Sizes()


def run(description: str | None, cases: Mapping[str, Case]) -> None:
    """The script of a family: one case, one line."""
    asked = arguments(description, cases).parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    line: dict[str, Any] = {"case": asked.case, "tiny": asked.tiny, "device": device_name()}
    try:
        found = cases[asked.case](asked)
        speed = found.tokens_per_second
        line |= {
            "tokens_per_second": round(speed, 1),
            "peak_gib": None if found.peak_gib is None else round(found.peak_gib, 3),
            "tflops": round(speed * found.flops_per_token / 1e12, 3),
            "said": found.said,
            **found.more,
        }
    except NotHere as why:
        line["not_here"] = str(why)
    except torch.OutOfMemoryError as error:
        line["failed"] = f"out of memory: {' '.join(str(error).split())[:160]}"
    line |= {"seconds": round(time.monotonic() - begin, 1), "versions": versions()}
    print(PREFIX + json.dumps(line), flush=True)


def device_name() -> str:
    """The GPU, or the CPU and its threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """Most that tensors took on the GPU since the count was reset."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def time_steps(
    batches: Iterable[Mapping[str, Tensor]],
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    warm: int,
    together: int = 1,
    clip: float = 0.3,
) -> tuple[list[int], list[float]]:
    """(useful tokens, seconds) of each ``together`` steps after ``warm`` ones, of a loop as people write it.

    Under autocast. The peak is counted from the end of the warm-up. A batch's ``tokens``, where it is there, are its
    useful ones. The GPU is waited for before and after each measurement alone.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tokens, seconds, counted, begin = list[int](), list[float](), 0, 0.0
    number = -warm
    for number, batch in enumerate(batches, start=-warm):
        if not number and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if number >= 0 and number % together == 0:
            synchronize()
            begin, counted = time.perf_counter(), 0
        inputs = {k: v.to(trained[0].device, non_blocking=True) for k, v in batch.items() if k != "tokens"}
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            loss = loss_of(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted += int(batch["tokens"]) if "tokens" in batch else batch["input_ids"].numel()
        if number >= 0 and (number + 1) % together == 0:
            synchronize()
            seconds.append(time.perf_counter() - begin)
            tokens.append(counted)
    assert (number + 1) % together == 0, f"{number + 1} steps are no multiple of {together}"
    return tokens, seconds


def median_rate(tokens: list[int], seconds: list[float]) -> float:
    """Of steps that are all alike."""
    return statistics.median(count / took for count, took in zip(tokens, seconds, strict=True))


def mean_rate(tokens: list[int], seconds: list[float]) -> float:
    """Of steps of different lengths."""
    return sum(tokens) / sum(seconds)


def random_batches(vocab: int, size: Sizes) -> list[dict[str, Tensor]]:
    """Fresh ids for each step, every one a label."""
    drawn = torch.Generator().manual_seed(1)
    shape = (size.rows, size.length)
    rows = [torch.randint(0, vocab, shape, generator=drawn) for _ in range(size.warm + size.steps)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def quiet() -> None:
    """No network, no telemetry, no bars; before peers are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
