"""NF4 with double quantization to bf16: the kernel in Triton beside bitsandbytes', and beside a copy of as many bytes;
and to e4m3 rows, whose GB/s are those of bf16 too.

    python benchmarks/nf4_dequantize.py [OUT.md] [--tiny] [--tune]

Medians; bytes are those of codes, block scales and numbers, each moved once. Without a GPU only bitsandbytes' row
runs, on small weights. --tune tries other tiles of the kernel too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from qtrain.kernels import nf4_dequantize as kernel
from qtrain.kernels.fp8_product import fp8_rows

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)]
TINY = [(128, 256), (256, 128)]
TILES = [(words, warps) for words in (256, 512, 1024, 2048) for warps in (2, 4, 8)]


def milliseconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=200, return_mode="median"))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def rows_of(shape: tuple[int, int], device: str, tune: bool) -> list[tuple[str, float]]:
    """(what, ms) of one weight, the bits of the kernel checked before it is timed."""
    words, state = quantize_4bit(torch.randn(shape, device=device), compress_statistics=True, quant_type="nf4")
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    given = out if device == "cuda" else None
    found = [("bitsandbytes", milliseconds(lambda: kernel.dequantize_4bit(words, state, torch.bfloat16, given)))]
    if kernel.nf4_tiles is None or device != "cuda":
        return found
    tiles = kernel.nf4_tiles
    wanted = kernel.dequantize_4bit(words, state, torch.bfloat16)
    own = (tiles.WORDS, tiles.WARPS)
    for tiles.WORDS, tiles.WARPS in [own, *(TILES if tune else [])]:
        name = f"Triton, {tiles.WORDS} words, {tiles.WARPS} warps"
        out.zero_()
        if not torch.equal(kernel.nf4_dequantize(words, state, torch.bfloat16, out), wanted):
            name += " (OTHER BITS)"
        found.append((name, milliseconds(lambda: kernel.nf4_dequantize(words, state, torch.bfloat16, out))))
    tiles.WORDS, tiles.WARPS = own
    half = torch.empty(moved(shape) // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    found.append(("a copy of as many bytes", milliseconds(lambda: other.copy_(half))))
    codes, scale = fp8_rows(wanted)
    ways: dict[str, Callable[[], Tensor | None]] = {
        "e4m3 rows by way of bf16": lambda: fp8_rows(kernel.nf4_dequantize(words, state, torch.bfloat16, out)).codes,
        "e4m3 rows at once": lambda: kernel.nf4_fp8_codes(words, state, scale, torch.bfloat16),
        "the same, turned over": lambda: kernel.nf4_fp8_codes(words, state, scale, torch.bfloat16, turn=True),
    }
    for name, way in ways.items():
        made = way()
        assert made is not None
        same = torch.equal((made.t() if "turned" in name else made).float(), codes.float())
        found.append((name + ("" if same else " (OTHER BITS)"), milliseconds(way)))
    return found


def moved(shape: tuple[int, int]) -> int:
    """Bytes: half of one a code, one each 64 codes, four each 64 * 256, two a number."""
    numbers = shape[0] * shape[1]
    return int(numbers * (0.5 + 1 / 64 + 4 / 64 / 256 + 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [f"| {'weight':<13} | {'kernel':<26} | {'ms':>8} | {'GB/s':>7} | {'bitsandbytes / it':>17} |"]
    lines.append(f"|{'-' * 15}|{'-' * 28}|{'-' * 10}|{'-' * 9}|{'-' * 19}|")
    for shape in TINY if arguments.tiny or device == "cpu" else SHAPES:
        found = rows_of(shape, device, arguments.tune)
        for name, taken in found:
            speed, ratio = moved(shape) / taken / 1e6, found[0][1] / taken
            lines.append(
                f"| {shape[0]:>5} x {shape[1]:<5} | {name:<26} | {taken:>8.4f} | {speed:>7.0f} | {ratio:>17.2f} |"
            )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines += ["", f"{where}, torch {torch.__version__}"]
    if kernel.nf4_tiles is None or device != "cuda":
        lines.append("the kernel in Triton needs a GPU: bitsandbytes alone was timed")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
