"""A step of distillation through output heads, forward and backward, by the kernel and by PyTorch: time, and peak bytes
beyond weights and hidden states.

    python -m benchmarks.divergence [OUT.md] [--tiny] [--tune]

Medians in bf16, the teacher's head as wide as the student's. "products" multiplies the same chunks and computes no
divergence: no kernel can be faster. --tune times the kernel alone with other tiles. Without a GPU, on small sizes, the
kernel's row is left out.
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
from torch import Tensor

from qtrain.distill import targets
from qtrain.distill.divergence import Objective
from qtrain.distill.linear_divergence import linear_divergence
from qtrain.distill.targets import TeacherHead
from qtrain.kernels import divergence as kernel

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BF16, MIB = torch.bfloat16, 2**20
SIZES = [(8192, 2048, 32000), (8192, 4096, 32000), (8192, 2048, 128256), (8192, 4096, 128256)]
TINY = [(64, 32, 500)]
OBJECTIVES = [Objective("forward_kl"), Objective("reverse_kl"), Objective("jsd"), Objective("forward_kl", 2.0, 0.5)]
TILES = [(2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32)]


def milliseconds(run: Callable[[], object]) -> float:
    if ON_GPU:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=100, return_mode="median"))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak(run: Callable[[], object]) -> float:
    """MiB that a run takes beyond what is there; 0 without a GPU."""
    if not ON_GPU:
        return 0.0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def nothing(logits: Tensor, teacher: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """In place of a divergence."""
    return logits[:, 0].float(), logits


def ways() -> list[tuple[str, list[Any]]]:
    """(name, what is exchanged for it)."""
    without = [mock.patch.object(kernel, "divergence_tiles", None)]
    known = [("products", [mock.patch.object(targets, "divergence_", nothing)]), ("plain PyTorch", without)]
    return [*known, ("a kernel", [])] if kernel.one_pass(DEVICE, BF16) else known


def step(size: tuple[int, int, int], *, trains: bool) -> Callable[[Objective], float]:
    """A run of forward and backward; ``trains``: the head has a gradient too."""
    tokens, width, vocab = size
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = (torch.randn(vocab, width, device=DEVICE) / width**0.5).to(BF16).requires_grad_(trains)
    near = (weight.detach() + 0.1 * torch.randn_like(weight) / width**0.5).to(BF16)
    teacher, labels = TeacherHead(hidden.detach(), near), torch.zeros(tokens, dtype=torch.int64, device=DEVICE)

    def run(objective: Objective) -> float:
        hidden.grad = weight.grad = None
        loss = linear_divergence(hidden, weight, teacher, labels, objective)
        (loss / tokens).backward()
        return float(loss.detach())

    return run


def tuned(vocab: int, objective: Objective) -> list[str]:
    """The kernel alone on a chunk of 1024 rows; GB/s of five passes over numbers of two bytes."""
    tiles = kernel.divergence_tiles
    fields = {"loss": objective.loss, "temperature": objective.temperature}
    fields |= {"ce_weight": objective.ce_weight, "jsd_beta": objective.jsd_beta}
    teacher = torch.randn(1024, vocab, device=DEVICE, dtype=BF16)
    student, target = teacher.clone(), torch.zeros(1024, dtype=torch.int64, device=DEVICE)
    own, lines = (tiles.BLOCK, tiles.WARPS), []
    for tiles.BLOCK, tiles.WARPS in TILES:
        taken = milliseconds(lambda: kernel.divergence_(student, teacher, target, **fields))
        speed = 5 * 2 * student.numel() / taken / 1e6
        name = f"{objective.loss} {objective.temperature} {objective.ce_weight}"
        lines.append(f"{name}, {vocab} columns: {tiles.BLOCK} a tile, {tiles.WARPS} warps: {taken:.3f} ms, {speed:.0f}")
    tiles.BLOCK, tiles.WARPS = own
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true")
    asked = parser.parse_args()
    lines = [f"| tokens x width x vocab | head | {'loss':<24} | by | ms | peak MiB | nats a token | plain / it |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for size in TINY if asked.tiny or not ON_GPU else SIZES:
        for trains in (False, True):
            run = step(size, trains=trains)
            for objective in OBJECTIVES:
                found = {}
                for name, exchanged in ways():
                    for patch in exchanged:
                        patch.start()
                    # The first run compiles.
                    value = run(objective) / size[0]
                    held = peak(lambda run=run, objective=objective: run(objective))  # type: ignore[misc]
                    taken = milliseconds(lambda run=run, objective=objective: run(objective))  # type: ignore[misc]
                    found[name] = (taken, held, value)
                    for patch in exchanged:
                        patch.stop()
                where = f"| {' x '.join(map(str, size))} | {'trains' if trains else 'frozen'} "
                what = f"{objective.loss}, T {objective.temperature:g}, ce {objective.ce_weight:g}"
                for name, (taken, held, value) in found.items():
                    shown = "-" if name == "products" else f"{value:.6f}"
                    ratio = found["plain PyTorch"][0] / taken
                    lines.append(f"{where}| {what:<24} | {name} | {taken:.2f} | {held:.0f} | {shown} | {ratio:.2f} |")
                    print(lines[-1], flush=True)
            del run
    if asked.tune and kernel.one_pass(DEVICE, BF16):
        lines += ["", *(line for objective in OBJECTIVES for v in (32000, 128256) for line in tuned(v, objective))]
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    lines += ["", f"{where}, torch {torch.__version__}"]
    if not kernel.one_pass(DEVICE, BF16):
        lines.append("the kernel in Triton needs a GPU: plain PyTorch alone was timed")
    print("\n".join(lines[:2] + lines[-4:]))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
