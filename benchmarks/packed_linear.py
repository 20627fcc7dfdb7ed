"""Packed integers: unpacked to numbers, and the gradients of their scales; Triton beside plain PyTorch.

    python benchmarks/packed_linear.py [OUT.md] [--out 11008] [--in 4096] [--tokens 8192] [--tiny]

bf16, medians of 20 runs taken in turn after 5 that are not counted. Dequantization: GB/s of what is read and written
(codes, scales, numbers). Gradient: TFLOP/s of dY^T X, whose own product by cuBLAS is the peer: what no kernel that
needs it can undercut. "beyond" is what is allocated above inputs and results. --tiny runs on a CPU: plain alone, or
both in Triton's interpreter (TRITON_INTERPRET=1), whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtrain.kernels import packed_linear as kernel
from qtrain.kernels.packed_linear import Packed, packed_weight
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.packing import pack
from qtrain.numerics.spec import QuantSpec

WARMUP, ROUNDS = 5, 20
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = {
    "int2 g64": QuantSpec("int2", symmetric=False, group_size=64),
    "int3 g128": QuantSpec("int3", symmetric=False, group_size=128),
    "int4 g32": QuantSpec("int4", group_size=32),
    "int4 g128": QuantSpec("int4", symmetric=False, group_size=128),
    "int4 row": QuantSpec("int4", granularity="per_channel", group_size=None),
    "int8 row": QuantSpec("int8", granularity="per_channel", group_size=None),
}


@dataclass(frozen=True)
class Work:
    """Something to run: by whom, what it moves or computes, and what it returns."""

    name: str
    run: Callable[[], object]
    amount: float
    unit: str
    result: int


def works(spec: QuantSpec, x: Tensor, dy: Tensor) -> dict[str, list[Work]]:
    out, columns, device = dy.shape[1], x.shape[1], x.device
    weight = torch.randn(out, columns, device=device)
    qparams = choose_qparams(weight, spec)
    packed = Packed(pack(quantize(weight, qparams, spec), spec.bits), columns, spec)
    del weight
    scale, zero = qparams.scale.float(), qparams.zero_point
    tiled = packed._replace(tiles=True)
    number = x.element_size() * out * columns
    moved = (packed.words.nbytes + scale.numel() * (4 + (zero is not None)) + number) / 1e9
    flops = 2 * x.numel() * out / 1e12

    def gradient(which: Packed) -> Callable[[], object]:
        return lambda: kernel._from_weight_gradient(dy, x, which, scale, zero, False)

    chosen = [("plain", packed)] + ([("triton", tiled)] if kernel._tiled(tiled, x, x.dtype) else [])
    unpacking = [
        Work(name, lambda p=p: packed_weight(p, scale, zero, x.dtype), moved, "GB/s", number) for name, p in chosen
    ]
    learning = [Work(name, gradient(p), flops, "TFLOP/s", 4 * scale.numel()) for name, p in chosen]
    learning.append(Work("dY^T X alone", lambda: dy.t() @ x, flops, "TFLOP/s", number))
    # One scale a row is learned from dY and Y; its group-wise kernel serves where zero points train too.
    return {"dequantization": unpacking, "scale gradient": learning}


def measure(work: list[Work], device: torch.device, rounds: int) -> list[tuple[float, int]]:
    """(median seconds, bytes beyond the result) of each."""
    times: list[list[float]] = [[] for _ in work]
    beyond = [0] * len(work)
    for turn in range(WARMUP + rounds if rounds > 1 else 1):
        for number, one in enumerate(work):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            one.run()
            if device.type == "cuda":
                torch.cuda.synchronize()
                beyond[number] = torch.cuda.max_memory_allocated() - before - one.result
            if turn >= WARMUP or rounds == 1:
                times[number].append(time.perf_counter() - begin)
    return [(statistics.median(seconds), extra) for seconds, extra in zip(times, beyond, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", metavar="OUT.md")
    parser.add_argument("--out", type=int, default=11008)
    parser.add_argument("--in", type=int, default=4096, dest="columns")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, columns, tokens = (96, 256, 80) if asked.tiny else (asked.out, asked.columns, asked.tokens)
    if INTERPRETED and kernel.packed_tiles is not None:
        kernel.packed_tiles.fits = lambda tensor, dtype: True  # it runs on a CPU too
    dtype = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter has no products in bf16
    torch.manual_seed(0)
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    dy = torch.randn(tokens, out, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows = [
        f"{out} x {columns} weights, {tokens} tokens, {str(dtype).removeprefix('torch.')}, {name}, "
        f"torch {torch.__version__}",
        "",
        "| weights   | what           | by            |       ms |             rate | of plain | beyond, MiB |",
        "|-----------|----------------|---------------|---------:|-----------------:|---------:|------------:|",
    ]
    for label, spec in CASES.items():
        for what, work in works(spec, x, dy).items():
            found = measure(work, device, 1 if asked.tiny else ROUNDS)
            plain = found[0][0]
            for one, (seconds, extra) in zip(work, found, strict=True):
                rate = f"{one.amount / seconds:,.1f} {one.unit}"
                rows.append(
                    f"| {label:<9} | {what:<14} | {one.name:<13} | {1e3 * seconds:>8.3f} | {rate:>16} "
                    f"| {plain / seconds:>7.2f}x | {extra / 2**20:>11.1f} |"
                )
    print("\n".join(rows))
    if asked.report:
        Path(asked.report).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
