"""What a layer takes the host to launch: a Llama of 32 layers so small that its GPU has done all at once.

    python -m benchmarks.gpu.host_layer OUT.md [CASE ...] [--layers 32]

CASE is one of CASES. The GPU is waited for before each step; times are medians of 16 steps after 4, of the host,
divided by the layers: embedding, head and loss are in them, a few hundredths. A process each. A step of a large model
has to wait for its host where these, times its layers, are longer than its kernels.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu.measure import Sizes, device_name, quiet, synchronize
from benchmarks.gpu.models import repeated_model
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_7B
from benchmarks.gpu.training import train_ours
from benchmarks.result_file import free_name
from qtrain.files import write_text

SIZE = Sizes(rows=1, length=128, warm=4, steps=16, together=4)
CASES: dict[str, tuple[str, ...]] = {
    "qlora": tuple(qlora_words()),
    "qlora, fp8": (*qlora_words(), "method.compute_dtype=fp8"),
    "peqa": ("method.name=peqa", "method.init=rtn", "method.weight.format=int4", "optimizer.name=adamw_8bit"),
}
COMMON = ("trainer.gradient_clip_val=0.3", "run.recompute=none", "data.packing=false")


class Clock(Callback):
    """When the host is done with the forward pass, the backward pass and the rest."""

    def __init__(self) -> None:
        self.rows = list[list[float]]()

    def on_train_batch_start(self, *_: object) -> None:
        synchronize()
        self.times = [time.perf_counter()]

    def on_before_backward(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_after_backward(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())
        self.rows.append([1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)])


def row(case: str, layers: int) -> str:
    """Milliseconds: forward and backward by the layer, the rest of a step as it is."""
    shape = replace(LLAMA_7B.tiny(), hidden=256, intermediate=512, layers=layers)
    clock = Clock()
    train_ours(repeated_model(shape), [*CASES[case], *COMMON], shape, SIZE, [clock])
    forward, backward, rest = (statistics.median(column) for column in zip(*clock.rows[SIZE.warm :], strict=True))
    return f"| {case} | {forward / layers:.2f} | {backward / layers:.2f} | {rest:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--alone", action="store_true", help="one case, its row to stdout and no table")
    asked = parser.parse_args()
    if asked.alone:
        print(row(asked.cases[0], asked.layers))
        return
    lines = [f"# What a layer takes the host, on {device_name()}, torch {torch.__version__}", ""]
    lines += ["| ms of the host | a layer forward | a layer backward | the rest of a step |", "|---|---|---|---|"]
    for case in asked.cases:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.host_layer", str(asked.out), case, "--alone"]
        command += ["--layers", str(asked.layers)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        lines.append(next(line for line in said.splitlines() if line.startswith(f"| {case} |")))
        print(lines[-1], flush=True)
    write_text(free_name(asked.out), "\n".join([*lines, ""]))


if __name__ == "__main__":
    quiet()
    main()
