"""A step of 8-bit AdamW on the adapters of a 7B Llama: bitsandbytes' loop beside all tensors in one launch.

    python -m benchmarks.adamw8 [OUT.md] [--tiny]

Rank 64 on all linears of 32 layers: 448 tensors in fp32. Medians; "GB/s" counts what has to move, 16 bytes a weight and
16 a block of 256. "kernels" is the time of the GPU alone, "step" what passes until it is through.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from torch.optim import Optimizer

from qtrain.kernels import adamw8
from qtrain.training.bnb_optimizers import AdamW8bit, PagedAdamW8bit

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYER = [*[(64, 4096)] * 6, (64, 11008), *[(4096, 64)] * 5, *[(11008, 64)] * 2]
TINY = [(8, 640), (4097,), (300,)]
CASES = [
    ("bitsandbytes, AdamW8bit", bnb.optim.AdamW8bit),
    ("ours, AdamW8bit", AdamW8bit),
    ("bitsandbytes, PagedAdamW8bit", bnb.optim.PagedAdamW8bit),
    ("ours, PagedAdamW8bit", PagedAdamW8bit),
]


def step_ms(run: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        if ON_GPU:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def kernel_ms(run: Callable[[], object], count: int) -> float:
    """Of all kernels of a step, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    shapes = TINY if asked.tiny else LAYER * 32
    lines = [f"| {'optimizer':<30} | {'step, ms':>8} | {'kernels, ms':>11} | {'GB/s':>6} |"]
    lines.append(f"|{'-' * 32}|{'-' * 10}|{'-' * 13}|{'-' * 8}|")
    for name, cls in CASES:
        weights = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer: Optimizer = cls(weights, lr=1e-4)
        for _ in range(3):
            optimizer.step()
        taken = step_ms(optimizer.step, 20 if ON_GPU else 3)
        kernels = kernel_ms(optimizer.step, 10) if ON_GPU else float("nan")
        moved = sum(16 * weight.numel() + 16 * -(-weight.numel() // 256) for weight in weights)
        lines.append(f"| {name:<30} | {taken:>8.3f} | {kernels:>11.3f} | {moved / kernels / 1e6:>6.0f} |")
        del optimizer, weights
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    count = sum(torch.Size(shape).numel() for shape in shapes)
    lines += ["", f"{count:,} weights in {len(shapes)} tensors, {where}, torch {torch.__version__}"]
    if not (ON_GPU and adamw8.has_kernel()):
        lines.append("the kernel in Triton needs a GPU: all rows are bitsandbytes'")
    print("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
