"""Where the host is while a GPU trains: launches of our kernels one by one, and steps of QAT.

    python -m benchmarks.gpu.host_time OUT.md [CASE ...] [--tiny] [--work DIR]

CASE is one of benchmarks.gpu.qat. Each runs with kernels launched as training launches them, and with each launch left
to Triton (`kernel[grid](...)`), in a process of its own: what a profiler leaves behind makes every later launch slower.
Host times are medians of seven steps that nothing else watches; "GPU busy" and "idle" are one more step's, begun with
nothing to do, by torch's profiler of CUDA alone. Where the host waits for the GPU, as liger-kernel's loss does, or for
room in its queue, that is a part of its time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.gpu import qat, training
from benchmarks.gpu.measure import device_name, quiet
from benchmarks.result_file import free_name
from qtrain.files import write_text
from qtrain.kernels.codes import codes, turned
from qtrain.kernels.fake_quantize import forward
from qtrain.kernels.int8_linear import ROW_BYTES
from qtrain.kernels.int8_matmul import int8_matmul
from qtrain.numerics.rules import Dynamic
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
WAYS = {"by look-up": False, "by Triton": True}
FIRST, LAST, PROFILED = (4, 10, 12) if ON_GPU else (1, 2, 12)
"""Steps that are timed, and the one that is profiled."""


@contextmanager
def launched(by_triton: bool) -> Iterator[None]:
    """Kernels launched in one of the two ways."""
    if not by_triton:
        yield
        return
    with mock.patch("qtrain.kernels.launch.JITFunction", type("Nothing", (), {})):
        yield


class Clock(Callback):
    """When the host is done with the forward pass, the backward pass and the step, and one step's kernels."""

    def __init__(self) -> None:
        self.step, self.rows = 0, list[tuple[float, ...]]()
        self.busy = self.idle = 0.0
        self.kernels = 0
        self._profile: Any = None

    def on_train_batch_start(self, *_: object) -> None:
        if self.step == PROFILED and ON_GPU:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.__enter__()
        self.times = [time.perf_counter()]

    def on_before_backward(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_after_backward(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())
        if FIRST <= self.step <= LAST:
            self.rows.append(tuple(1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)))
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._read(self._profile.events())
            self._profile = None
        self.step += 1

    def _read(self, events: Any) -> None:
        on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu if not e.name.startswith("Optimizer"))
        end, self.kernels = spans[0][0], len(spans)
        for start, stop in spans:
            self.idle += max(0.0, start - end) / 1e3
            self.busy += max(0.0, stop - max(start, end)) / 1e3
            end = max(end, stop)


def step_row(case: str, way: str, asked: argparse.Namespace) -> str:
    clock, train = Clock(), training.train

    def watched(*args: Any, callbacks: Any = (), **more: Any) -> Any:
        return train(*args, callbacks=[*callbacks, clock], **more)

    asked.case = case
    with (
        launched(WAYS[way]),
        mock.patch.object(training, "train", watched),
        mock.patch.object(qat, "train", watched),
    ):
        found = qat.CASES[case](asked)
    host = [statistics.median(column) for column in zip(*clock.rows, strict=True)] or [0.0] * 3
    words = [f"{found.tokens_per_second:,.0f}", *(f"{ms:.1f}" for ms in host)]
    return f"| {case} | {way} | {' | '.join(words)} | {clock.busy:.1f} | {clock.idle:.1f} | {clock.kernels:,} |"


def launches() -> dict[str, Callable[[], object]]:
    """One kernel each, on tensors so small that the GPU is done before the host is."""
    x, w = (torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16) for rows in (128, 256))
    large = torch.randn(256, 2048, device="cuda", dtype=torch.bfloat16)
    key = Dynamic(QuantSpec("int4", granularity="per_channel", group_size=None, scale_dtype="bf16")).key
    (q, s), (qw, sw), (ql, sl) = (codes(one, ROW_BYTES.key) for one in (x, w, large))
    return {
        "torch's product": lambda: torch.mm(x, w),
        "codes of rows": lambda: codes(x, ROW_BYTES.key),
        "codes turned over": lambda: turned(qw),
        "levels of a weight": lambda: forward(w, None, None, key, torch.bfloat16),
        "product of bytes": lambda: int8_matmul(q[:64], qw, s[:64], sw, None, torch.bfloat16),
        "product of bytes, copy engine": lambda: int8_matmul(ql, ql, sl, sl, None, torch.bfloat16),
    }


def microseconds(run: Callable[[], object], times: int = 40) -> float:
    """Of the host, by the call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return 1e6 * (time.perf_counter() - begin) / times


def launch_row(name: str, run: Callable[[], object], rounds: int = 15) -> str:
    """Both ways in turn, after a round that counts for nothing."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, by_triton in WAYS.items():
            with launched(by_triton):
                found[way].append(microseconds(run))
    return f"| {name} | {' | '.join(f'{statistics.median(times[1:]):.1f}' for times in found.values())} |"


def in_own_process(case: str, way: str, asked: argparse.Namespace) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.host_time", str(asked.out), case, "--way", way]
    command += ["--work", str(asked.work), *(["--tiny"] if asked.tiny else [])]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return next(line for line in said.splitlines() if line.startswith(f"| {case} |"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", default=["1b:bf16", "1b:w4a8-int8:bf16", "1b:w4a8-int8-gradient:bf16"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--way", choices=WAYS, help="one case alone, its row to stdout and no table")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.way:
        print(step_row(asked.cases[0], asked.way, asked))
        return
    lines = [f"# The host's time on {device_name()}, torch {torch.__version__}", ""]
    if ON_GPU:
        lines += [f"| us of the host for a call | {' | '.join(WAYS)} |", "|---|---|---|"]
        lines += [*(launch_row(name, run) for name, run in launches().items()), ""]
    names = ["host: forward, ms", "backward, ms", "the rest, ms", "GPU busy, ms", "idle, ms", "kernels"]
    lines += [f"| case | launched | tokens/s | {' | '.join(names)} |", "|---" * 9 + "|"]
    for case in asked.cases:
        ours = ON_GPU and case.partition(":")[2] not in ("bf16", "fp32")
        for way in WAYS if ours else ["by look-up"]:
            lines.append(in_own_process(case, way, asked))
            print(lines[-1], flush=True)
    write_text(free_name(asked.out), "\n".join([*lines, ""]))


if __name__ == "__main__":
    quiet()
    main()
