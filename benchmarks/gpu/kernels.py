"""Every kernel beside its plain twin in PyTorch, torch.compile of that, a peer, and a copy of as many bytes.

    python -m benchmarks.gpu.kernels [NAME ...] [--out FILE.md] [--compile-limit 45] [--tiny]

A NAME is the kernel's module. One layer of a 7B Llama: 8192 tokens, 4096, 11008, vocabulary 32000; medians of the
GPU's own time, its L2 overwritten before each run. "copy / it" is the share of the memory's speed that is reached,
"apart" the norm of the difference to the plain twin over that twin's. Without a GPU sizes are tiny, and the kernels
run where Triton's interpreter is on (TRITON_INTERPRET=1); times mean nothing then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu.kernel_cases import layers, optimizers, products, rows, weights
from benchmarks.gpu.kernel_cases.case import ON_GPU, TINY, Case, Found, NotHere, Sizes, measured
from benchmarks.gpu.measure import device_name, quiet, versions
from benchmarks.result_file import free_name

CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "adamw": optimizers.adamw,
    "adamw8": optimizers.adamw8,
    "code_rows": rows.code_rows,
    "cross_entropy": layers.cross_entropy,
    "fp8_product": products.fp8_product,
    "gated": layers.gated,
    "gated_codes": rows.gated_codes,
    "int8_matmul": products.int8_matmul,
    "int8_product": products.int8_product,
    "nf4_dequantize": weights.nf4_dequantize,
    "packed_linear": weights.packed_linear,
    "quantize_rows": rows.quantize_rows,
    "rms_norm": layers.rms_norm,
    "rotary": layers.rotary,
}
HEAD = ("kernel", "by", "ms", "rate", "copy / it", "plain / it", "apart")


def cells_of(name: str, case: Case, found: Sequence[Found]) -> list[list[str]]:
    """Rows of the table."""
    times = {one.way: one.ms for one in found}
    cells = []
    for one in found:
        title = f"{name}: {case.what}" if one is found[0] else ""
        if one.ms is None:
            cells.append([title, one.way, *[""] * 4, one.why])
            continue
        rate = f"{case.flops / one.ms / 1e9:,.1f} T(FL)OP/s" if case.flops else f"{case.moved / one.ms / 1e6:,.0f} GB/s"
        ratios = [f"{of / one.ms:.2f}" if of else "" for of in map(times.get, ("a copy of as many bytes", "plain"))]
        cells.append([title, one.way, f"{one.ms:.4f}", rate, *ratios, "" if one.apart is None else f"{one.apart:.1e}"])
    return cells


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    shown = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (HEAD, *rows)]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def main() -> int:
    """The command; status 1 if a kernel of ours, or its twin, failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, help="a file that is there is left as it is: -2 goes behind the name")
    parser.add_argument("--compile-limit", type=float, default=45, help="seconds after which no twin is compiled")
    parser.add_argument("--tiny", action="store_true", help="small operands, as without a GPU")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(CASES):
        parser.error(f"no kernel {sorted(unknown)[0]!r}: {', '.join(CASES)}")
    begin, broken = time.monotonic(), False
    rows: list[list[str]] = []
    for name in asked.names or CASES:
        try:
            for case in CASES[name](TINY if asked.tiny or not ON_GPU else Sizes()):
                found = list(measured(case, ON_GPU and time.monotonic() - begin < asked.compile_limit))
                broken |= any(one.broken for one in found)
                rows += cells_of(name, case, found)
                print("\n".join(" | ".join(cells) for cells in rows[-len(found) :]), flush=True)
        except NotHere as why:
            rows.append([name, *[""] * 5, f"not here: {why}"])
        except Exception as error:  # a twin that fails leaves the others their rows
            broken = True
            rows.append([name, "plain", *[""] * 4, f"failed: {type(error).__name__}: {error}"])
        # What was compiled holds operands of its own.
        torch._dynamo.reset()
        if ON_GPU:
            torch.cuda.empty_cache()
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [
        f"# Kernels beside their twins, {date.today().isoformat()}",
        f"    python -m benchmarks.gpu.kernels {' '.join(sys.argv[1:])}".rstrip(),
        f"{device_name()}; {packages}; {time.monotonic() - begin:.0f} s in all.",
        table(rows),
    ]
    text = "\n\n".join(parts) + "\n"
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        free_name(asked.out).write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(broken)


if __name__ == "__main__":
    quiet()
    sys.exit(main())
