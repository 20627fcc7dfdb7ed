"""What products of fewer bits cost in quality: pairs of `qtrain fit` that differ in one key, over several seeds.

    python benchmarks/cost_in_loss.py input_gradient MODEL TRAIN TEST OUT.md [--seeds N] [--case NAME] [key=value ...]
    python benchmarks/cost_in_loss.py fp8            MODEL TRAIN TEST OUT.md ...

Both runs of a pair have one seed: the same rows in the same order, the same adapters. Cost = mean over the seeds of
ln(perplexity with the key / without) on the first 256 rows of TEST, its standard error beside it; and of QAT the
shares recovered. Runs lie below runs/cost_in_loss; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path("runs/cost_in_loss")
W4 = "{format: int4, range: learned, calibrate: mse}"
QAT = [
    *("method.name=qat", "method.kernels=int8", "method.activation.format=int8", "distill.loss=forward_kl"),
    *("data.max_length=512", "data.batch_size=16", "trainer.max_steps=512", "optimizer.betas=[0.9,0.95]"),
]
QLORA = ["method.name=qlora", "method.lora_alpha=32", "data.max_length=512"]
TRAINING = [
    *("optimizer.schedule=cosine", "optimizer.warmup=0.03", "data.eval_batch_size=16", "trainer.limit_val_batches=16"),
    "run.keep=1",
]


@dataclass(frozen=True)
class Experiment:
    """One key, with and without, on several trainings.

    Attributes:
        without: value of the key that costs nothing.
        cases: keys of each training, by its title.
    """

    key: str
    without: str
    value: str
    cases: dict[str, list[str]]


EXPERIMENTS = {
    "input_gradient": Experiment(
        *("method.input_gradient", "full", "int8"),
        {
            "W4 row, A8 token": [*QAT, f"method.weight={W4}", "optimizer.lr=2e-4", "method.scale_lr=2e-4"],
            "W8 row, A8 token": [*QAT, "method.weight.format=int8", "optimizer.lr=5e-5"],
        },
    ),
    "fp8": Experiment(
        *("method.compute_dtype", "bf16", "fp8"),
        {
            "r 16, lr 1e-3": [*QLORA, "method.r=16", "optimizer.lr=1e-3"],
            "r 64, lr 2e-4": [*QLORA, "method.r=64", "optimizer.lr=2e-4"],
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: a case of an experiment, a value of its key, a seed."""

    case: str
    value: str
    seed: int

    @property
    def directory(self) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{self.case} {self.value} {self.seed}")
        return ROOT / name

    @property
    def found(self) -> dict[str, Any] | None:
        file = self.directory / "fit.json"
        return json.loads(file.read_text()) if file.exists() else None


def command(run: Run, experiment: Experiment, files: list[str], overrides: list[str]) -> list[str]:
    model, train, test = files
    words = [f"model.path={model}", f"data.train={train}", f"data.validation={test}", *TRAINING]
    words += [*experiment.cases[run.case], f"{experiment.key}={run.value}", f"run.seed={run.seed}", *overrides]
    return [*("qtrain", "fit"), *words, f"run.dir={run.directory}", "run.overwrite=true"]


def train(runs: list[Run], commands: dict[Run, list[str]], at_a_time: int) -> None:
    """Run those that are not there, ``at_a_time`` processes beside each other."""
    waiting = [run for run in runs if run.found is None]
    working: dict[Run, subprocess.Popen[bytes]] = {}
    begin = time.monotonic()
    while waiting or working:
        while waiting and len(working) < at_a_time:
            run = waiting.pop(0)
            run.directory.parent.mkdir(parents=True, exist_ok=True)
            line = [sys.executable, "-W", "ignore", "-m", *commands[run]]
            with run.directory.with_suffix(".log").open("wb") as log:
                working[run] = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        for run in [run for run, process in working.items() if process.poll() is not None]:
            done = working.pop(run).returncode == 0
            shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)  # 1.6 GB each, read by nobody
            print(f"{time.monotonic() - begin:5.0f} s  {run}  {'' if done else 'failed'}", flush=True)
            if not done:
                for process in working.values():
                    process.terminate()
                sys.exit(run.directory.with_suffix(".log").read_text(errors="replace")[-2000:])
        time.sleep(0.2)


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table(experiment: Experiment, seeds: int) -> Iterator[str]:
    values = (experiment.without, experiment.value)
    yield f"| training | seed | before | {values[0]} | {values[1]} | cost, nats | recovered | recovered, {values[1]} |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in experiment.cases:
        costs, shares = [], []
        for seed in range(seeds):
            pair = [Run(case, value, seed).found for value in values]
            if None in pair:
                continue
            first, second = (found for found in pair if found)
            cost = second["val_loss_after"] - first["val_loss_after"]
            costs.append(cost)
            recovered = [share(found) for found in (first, second)]
            if None not in recovered:
                shares.append([value for value in recovered if value is not None])
            yield (
                f"| {case} | {seed} | {first['val_perplexity_before']:.3f} | {first['val_perplexity_after']:.3f} "
                f"| {second['val_perplexity_after']:.3f} | {cost:+.4f} | {' | '.join(map(percent, recovered))} |"
            )
        if costs:
            cost, error = mean(costs)
            lost = f"{mean([b - a for a, b in shares])[0] * 100:+.2f} points" if shares else "-"
            yield f"| **{case}** | mean of {len(costs)} | | | | **{cost:+.4f} ± {error:.4f}** | | {lost} |"


def share(found: dict[str, Any]) -> float | None:
    from qtrain.evaluation.recovery import Recovery

    recovery = found["recovery"]
    return Recovery(**{name: recovery[name] for name in ("full", "ptq", "qat")}).share if recovery else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("files", nargs=3, metavar="FILE", help="model, training data, test data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, default=3, help="a GPU is shared in slices: more gain little")
    parser.add_argument("--case", action="append", help="only this training of the experiment; may be repeated")
    words, overrides = parser.parse_known_args()
    experiment = EXPERIMENTS[words.experiment]
    if words.case:
        experiment = replace(experiment, cases={name: experiment.cases[name] for name in words.case})
    runs = [
        Run(case, value, seed)
        for case in experiment.cases
        for seed in range(words.seeds)
        for value in (experiment.without, experiment.value)
    ]
    commands = {run: command(run, experiment, words.files, overrides) for run in runs}
    begin = time.monotonic()
    train(runs, commands, words.at_a_time)
    found = [run.found for run in runs]
    lines = [*table(experiment, words.seeds), ""]
    lines += sorted({f"{entry['device']}; {entry['blocks']}" for entry in found if entry})
    speeds = [f"{entry['tokens_per_second'] or math.nan:,.0f}" for entry in found if entry]
    lines += [f"{time.monotonic() - begin:.0f} s in all, {words.at_a_time} at a time; os cpus {os.cpu_count()}."]
    lines += [f"tokens/s, in order: {', '.join(speeds)}.", "", "The first run of each case, with its keys:", ""]
    lines += [f"    {shlex.join(commands[run])}" for run in runs if run.value == experiment.without and run.seed == 0]
    print("\n".join(lines), flush=True)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
