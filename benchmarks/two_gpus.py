"""Two GPUs beside one: QLoRA of a 7B Llama under DDP, QAT of a 1B one and QLoRA of the 70B shape under FSDP2.

    python -m benchmarks.two_gpus OUT.md [--rows NAME ..] [--processes 1|2] [--limit SECONDS] [--work DIR] [--tiny]

The first two through `qtrain fit` on checkpoints of random weights (16 GB in DIR), each process 4 x 2048 tokens a step,
one GPU first and two after it. A rate is that of twenty steps after three. The third is benchmarks/gpu/fsdp_70b.py, on
two alone. Each result is in OUT.md as soon as it is there, and the end of each run's output beside it in OUT.log; a run
that is ended by the limit says there where each of its threads was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checkpoint import MODEL, TOKENS, make_model, make_tokenizer, make_tokens
from benchmarks.gpu.measure import device_name, shape_of, sizes
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_1B, LLAMA_7B, Shape
from qtrain.files import atomic_directory

STEPS = 23
"""`qtrain fit` measures ten at a time, after three."""
KEPT_LINES, KEPT_OF_FAILED = 30, 300
"""Of a run's output."""
LAST_WORDS = 3
"""Seconds in which a process that is ended writes where it was."""
QAT = ("method.name=qat", "method.weight.format=int8", "method.activation.format=int8", "optimizer.name=adamw")
FITS = {
    "qlora-7b": (LLAMA_7B, (*qlora_words(), "run.recompute=none", "trainer.gradient_clip_val=0.3"), "ddp"),
    "qat-w8a8-1b": (LLAMA_1B, (*QAT, "run.recompute=none", "optimizer.lr=1e-5"), "fsdp2"),
}
BIG = "qlora-70b"
RUNS = [*((name, processes) for name in FITS for processes in (1, 2)), (BIG, 2)]


def files(asked: argparse.Namespace, name: str, shape: Shape) -> Path:
    """A checkpoint and rows of ids, made once."""
    size = sizes(asked)
    parent: Path = asked.work / name
    if not (parent / MODEL).exists():
        with atomic_directory(parent / MODEL) as directory:
            make_model(directory, replace(shape, tied=False))
            make_tokenizer(directory, shape.vocab, {"eos_token": "</s>", "pad_token": "</s>"})
    if not (parent / TOKENS).exists():
        with atomic_directory(parent / TOKENS) as directory:
            make_tokens(directory, 2 * size.rows * STEPS, size.length, shape.vocab)
    return parent


def run(asked: argparse.Namespace, name: str, processes: int) -> dict[str, Any]:
    """Its figures, or what it said last."""
    directory = asked.work / name / f"run-{processes}"
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m"]
    if name == BIG:
        figures = directory / "figures.json"
        command += ["benchmarks.gpu.fsdp_70b", str(figures), *(["--tiny"] if asked.tiny else [])]
    else:
        figures = directory / "fit.json"
        command += ["qtrain", "fit", *fit_words(asked, name, processes), f"run.dir={directory}"]
    ended = logged(command, asked.out.with_suffix(".log"), asked.limit)
    found = {"failed": ended} if ended else json.loads(figures.read_text(encoding="utf-8"))
    shutil.rmtree(directory, ignore_errors=True)  # a checkpoint of the 1B with its optimizer's state is 18 GB
    return found


def fit_words(asked: argparse.Namespace, name: str, processes: int) -> list[str]:
    """Of ``qtrain fit`` on so many processes."""
    shape, words, strategy = FITS[name]
    size, parent = sizes(asked), files(asked, name, shape_of(shape, asked))
    found = [f"model.path={parent / MODEL}", f"data.train={parent / TOKENS}", f"data.max_length={size.length}"]
    found += [f"data.batch_size={size.rows}", *words, f"trainer.max_steps={STEPS}", f"trainer.devices={processes}"]
    found += [f"trainer.strategy={strategy}"] if processes > 1 else []
    return [*found, "trainer.accelerator=cpu"] if asked.tiny else found


def logged(command: list[str], log: Path, limit: float) -> str | None:
    """Run a command, its output at the end of ``log``, of which its last lines stay; why it gave nothing, or None."""
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        environ = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        late = False
        try:
            process.wait(limit)
        except BaseException as error:  # SIGTERM to this process too
            late = isinstance(error, subprocess.TimeoutExpired)
            print(f"--- ended after {time.monotonic() - started:.0f} s, at:", file=output, flush=True)
            abort(process.pid)
            if not late:
                raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    written = log.read_text(encoding="utf-8", errors="replace")[len(before) :]
    said, mark, stacks = written.partition("\n--- ended after")
    first, *lines = said.splitlines()
    lines = lines[-(KEPT_OF_FAILED if process.returncode else KEPT_LINES) :]
    kept = [first, f"({time.monotonic() - started:.0f} s, status {process.returncode})", *lines]
    log.write_text(before + "\n".join(kept) + mark + stacks + "\n\n", encoding="utf-8")
    if late:
        return f"ended after {limit:.0f} s"
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"exit status {process.returncode}: {last[:300]}" if process.returncode else None


def abort(group: int) -> None:
    """SIGABRT to each process of a group in turn: with PYTHONFAULTHANDLER=1 it writes its stacks, and ends."""
    for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                os.kill(pid, signal.SIGABRT)
                time.sleep(LAST_WORDS)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for name, _ in RUNS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--processes", type=int, choices=(1, 2), help="default: one, then two")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qtrain-bench-2")
    parser.add_argument("--tiny", action="store_true", help="small models on two processes of a CPU")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that goes on ends with this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an aborted process would write all of its memory
    lines = [
        "# Two GPUs beside one",
        "",
        "    python -m benchmarks.two_gpus OUT.md",
        "",
        f"{date.today()}, {device_name()}, torch {torch.__version__}; each process has the tokens of one alone.",
        "",
        "| | processes | strategy | tokens/s | times one | peak GiB | seconds in all | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".log").unlink(missing_ok=True)
    rates: dict[str, float] = {}
    for name, processes in RUNS:
        if name not in asked.rows or asked.processes not in (None, processes):
            continue
        found = run(asked, name, processes)
        lines.append(row(name, processes, found, rates))
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(lines[-1], flush=True)


def row(name: str, processes: int, found: dict[str, Any], rates: dict[str, float]) -> str:
    """A line of the table; ``rates`` remembers those of one process."""
    strategy = "" if processes == 1 else "fsdp2" if name == BIG else FITS[name][2]
    rate, losses = found.get("tokens_per_second"), found.get("losses")
    if processes == 1 and rate:
        rates[name] = rate
    cells = [
        *(name, str(processes), strategy),
        f"{rate:,.0f}" if rate else str(found.get("failed", "no rate")),
        f"{rate / rates[name]:.2f}" if rate and processes > 1 and name in rates else "",
        f"{found['peak_gib']:.2f}" if found.get("peak_gib") else "",
        f"{found['seconds']:.0f}" if found.get("seconds") else "",
        f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
