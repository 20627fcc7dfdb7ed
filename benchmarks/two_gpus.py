"""Two GPUs beside one: QLoRA of a 7B Llama under DDP, and QAT of a 1B one under FSDP2.

    python -m benchmarks.two_gpus OUT.md [--work DIR] [--tiny]

Both through `qtrain fit` on checkpoints of random weights (16 GB in DIR), each process 4 x 2048 tokens a step, one GPU
first and two after it. A rate is that of twenty steps after three.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu.checkpoint import MODEL, TOKENS, make_model, make_tokenizer, make_tokens
from benchmarks.gpu.measure import device_name, shape_of, sizes
from benchmarks.gpu.qlora_words import qlora_words
from benchmarks.gpu.shapes import LLAMA_1B, LLAMA_7B, Shape
from qtrain.files import atomic_directory

LIMIT = 300
"""Seconds of a run."""
STEPS = 23
"""`qtrain fit` measures ten at a time, after three."""
QAT = ("method.name=qat", "method.weight.format=int8", "method.activation.format=int8", "optimizer.name=adamw")
ROWS = {
    "QLoRA 7B": (LLAMA_7B, (*qlora_words(), "run.recompute=none", "trainer.gradient_clip_val=0.3"), "ddp"),
    "QAT W8A8 1B": (LLAMA_1B, (*QAT, "run.recompute=none", "optimizer.lr=1e-5"), "fsdp2"),
}


def files(asked: argparse.Namespace, name: str, shape: Shape) -> Path:
    """A checkpoint and rows of ids, made once."""
    size = sizes(asked)
    parent: Path = asked.work / name.replace(" ", "-").lower()
    if not (parent / MODEL).exists():
        with atomic_directory(parent / MODEL) as directory:
            make_model(directory, replace(shape, tied=False))
            make_tokenizer(directory, shape.vocab, {"eos_token": "</s>", "pad_token": "</s>"})
    if not (parent / TOKENS).exists():
        with atomic_directory(parent / TOKENS) as directory:
            make_tokens(directory, 2 * size.rows * STEPS, size.length, shape.vocab)
    return parent


def run(asked: argparse.Namespace, name: str, devices: int) -> dict[str, float | str]:
    """``qtrain fit`` on so many devices; its fit.json, or what it said last."""
    shape, words, strategy = ROWS[name]
    size, parent = sizes(asked), files(asked, name, shape_of(shape, asked))
    directory = parent / f"run-{devices}"
    command = [sys.executable, "-m", "qtrain", "fit", f"model.path={parent / MODEL}", f"data.train={parent / TOKENS}"]
    command += [f"data.max_length={size.length}", f"data.batch_size={size.rows}", *words, f"run.dir={directory}"]
    command += [f"trainer.max_steps={STEPS}", f"trainer.devices={devices}", "run.overwrite=true"]
    command += [f"trainer.strategy={strategy}"] if devices > 1 else []
    command += ["trainer.accelerator=cpu"] if asked.tiny else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ)
    except subprocess.TimeoutExpired:
        return {"failed": f"ended after {LIMIT} s"}
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return {"failed": f"exit status {done.returncode}: {said[-1][:300] if said else ''}"}
    found: dict[str, float | str] = json.loads((directory / "fit.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qtrain-bench-2")
    parser.add_argument("--tiny", action="store_true", help="small models on two processes of a CPU")
    asked = parser.parse_args()
    lines = [
        "# Two GPUs beside one",
        "",
        "    python -m benchmarks.two_gpus OUT.md",
        "",
        f"{date.today()}, {device_name()}, torch {torch.__version__}; each process has the tokens of one alone.",
        "",
        "| | processes | strategy | tokens/s | times one | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, _, strategy) in ROWS.items():
        first = 0.0
        for devices in (1, 2):
            found = run(asked, name, devices)
            rate, peak = found.get("tokens_per_second"), found.get("peak_gib")
            words = f"{rate:,.0f}" if isinstance(rate, float) else found.get("failed", "no rate")
            times = f"{rate / first:.2f}" if isinstance(rate, float) and first else ""
            first = rate if devices == 1 and isinstance(rate, float) else first
            memory = f"{peak:.2f}" if isinstance(peak, float) else ""
            lines.append(f"| {name} | {devices} | {strategy if devices > 1 else ''} | {words} | {times} | {memory} |")
            print(lines[-1], flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
