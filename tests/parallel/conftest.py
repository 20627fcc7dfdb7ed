"""What real runs of two processes share: data, the words of a run, and one start of torchrun for many of them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtrain.config.compose import load_recipe
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

METHODS = {
    "qlora": ("method.name=qlora", "method.r=4"),
    "lora": ("method.name=qlora", "method.base=none", "method.r=4"),
    "qat": (
        *("method.name=qat", "method.weight.format=int4", "method.weight.group_size=32", "method.weight.range=learned"),
        *("method.activation.format=int8", "method.scale_lr=1e-4", "optimizer.lr=1e-3"),
    ),
    "bytes": (
        *("method.name=qat", "method.weight.format=int8", "method.activation.format=int8", "method.kernels=int8"),
        "optimizer.lr=1e-3",
    ),
    "peqa": (
        *("method.name=peqa", "method.weight.format=int4", "method.weight.group_size=32", "method.init=hqq"),
        "optimizer.lr=1e-4",
    ),
}
# Each line of words is a `qtrain fit`; the processes stay, since to start one takes longer than a tiny run.
PROGRAM = """
import json, sys, warnings
from pathlib import Path
from qtrain.cli import main
for words in json.loads(Path(sys.argv[1]).read_text()):
    status = main(["fit", *words])
    if status:
        sys.exit(status)
"""


Words = Callable[..., tuple[str, ...]]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def methods() -> dict[str, tuple[str, ...]]:
    return METHODS


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """Of each optimizer step in a run's metrics.csv, in order."""

    def of(run: Path) -> list[float]:
        with (run / "metrics.csv").open() as file:
            rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
        assert [step for step, _ in rows] == list(range(len(rows)))
        return [loss for _, loss in rows]

    return of


@pytest.fixture(scope="session")
def alone() -> Callable[..., None]:
    """Fit in this process, which takes the steps of two."""

    def run(*words: str) -> None:
        config = load_recipe(None, *words, "trainer.accumulate_grad_batches=2")
        fit(config, RunDirectory.of(config))

    return run


@pytest.fixture(scope="session")
def words(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Words of a run of 8 steps in 4 rows, over 22 rows of different lengths: the epoch's last step has 2."""
    folder = tmp_path_factory.mktemp("chats")
    for name, count in (("train", 22), ("held_out", 5)):
        (folder / f"{name}.jsonl").write_text(
            "\n".join(
                f'{{"messages": [{{"role": "user", "content": "what is {n}"}}, '
                f'{{"role": "assistant", "content": "it is {"one and " * (n % 5)}{n}"}}]}}'
                for n in range(count)
            )
        )

    def of(run: Path, *more: str) -> tuple[str, ...]:
        return (
            *(f"model.path={tiny_llama_dir}", f"data.train={folder}/train.jsonl", "data.max_length=64"),
            *(f"data.validation={folder}/held_out.jsonl", "data.batch_size=2", "data.packing=false"),
            *("optimizer.lr=1e-2", "trainer.accelerator=cpu", "trainer.max_steps=8", "trainer.max_epochs=-1"),
            *(f"run.dir={run}", *more),
        )

    return of


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Run each line of words in two processes that torchrun starts."""

    def start(*lines: tuple[str, ...]) -> Done:
        folder = tmp_path_factory.mktemp("torchrun")
        (folder / "program.py").write_text(PROGRAM)
        (folder / "lines.json").write_text(json.dumps(lines))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return subprocess.run(
            [*command, str(folder / "program.py"), str(folder / "lines.json")],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    return start
