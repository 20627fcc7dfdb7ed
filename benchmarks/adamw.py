"""A step of AdamW on weights in bf16, rounded by chance, beside torch's: time, and bytes a weight.

    python -m benchmarks.adamw [OUT.md] [--tiny]

Medians, over the matrices of a few layers of the 1B shape; "GB/s" counts what has to move: each of w, g, m, v read
once, and w, m, v written once. torch's bf16 row rounds to nearest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from qtrain.kernels import adamw as kernel
from qtrain.training.stochastic_adamw import StochasticAdamW

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
LAYER = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
TINY = [(64, 128), (130, 70)]


def milliseconds(run: Callable[[], object]) -> float:
    if ON_GPU:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=300, return_mode="median"))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def plain(groups: list[dict[str, Any]], **options: Any) -> tuple[Optimizer, Callable[[], object]]:
    """Our optimizer without the kernel."""
    optimizer = StochasticAdamW(groups, **options)

    def step() -> None:
        with mock.patch.object(kernel, "adamw_tiles", None):
            optimizer.step()

    return optimizer, step


def fused(groups: list[dict[str, Any]]) -> tuple[Optimizer, Callable[[], object]]:
    """torch's, as `qtrain fit` has it."""
    optimizer = AdamW(groups, fused=ON_GPU)
    return optimizer, optimizer.step


def ours(groups: list[dict[str, Any]], **options: Any) -> tuple[Optimizer, Callable[[], object]]:
    """Ours, as `qtrain fit` has it."""
    optimizer = StochasticAdamW(groups, **options)
    return optimizer, optimizer.step


CASES: list[tuple[str, torch.dtype, int, Any]] = [
    ("torch, all in fp32", FP32, 28, fused),
    ("torch, all in bf16, to nearest", BF16, 14, fused),
    ("ours, bf16, moments in bf16", BF16, 14, lambda groups: ours(groups, moments=BF16)),
    ("ours, bf16, moments in fp32", BF16, 22, lambda groups: ours(groups, moments=FP32)),
    ("ours without the kernel, all in bf16", BF16, 14, lambda groups: plain(groups, moments=BF16)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    shapes = TINY if asked.tiny else LAYER * (4 if ON_GPU else 1)
    count = sum(rows * columns for rows, columns in shapes)
    lines = [f"| {'optimizer':<37} | bytes a weight | {'ms':>8} | {'GB/s':>6} | {'torch fp32 / it':>15} |"]
    lines.append(f"|{'-' * 39}|{'-' * 16}|{'-' * 10}|{'-' * 8}|{'-' * 17}|")
    first = None
    for name, dtype, moved, build in CASES:
        weights = [nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer, step = build([{"params": weights}])
        step()
        held = sum(
            value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step"
        ) + sum(2 * weight.nbytes for weight in weights)
        taken = milliseconds(step)
        first = first or taken
        speed = moved * count / taken / 1e6
        lines.append(f"| {name:<37} | {held / count:>14.1f} | {taken:>8.3f} | {speed:>6.0f} | {first / taken:>15.2f} |")
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    lines += ["", f"{count:,} weights in {len(shapes)} matrices, {where}, torch {torch.__version__}"]
    if not kernel.one_pass(weights[0]):
        lines.append("the kernel in Triton needs a GPU: our rows are plain PyTorch")
    print("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
