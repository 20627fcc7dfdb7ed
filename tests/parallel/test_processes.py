"""How many processes there are: what the config asks for, what was started, and what trains are one number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.training.fit import fit
from qtrain.training.processes import asked_for, started_by
from qtrain.training.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, (8, 2)),
        ({"WORLD_SIZE": "2"}, (2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, (4, 2)),
        ({"SLURM_NTASKS": "8"}, None),  # a batch script without srun: one process
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (2, 2)),
    ],
)
def test_who_started_how_many(environ: dict[str, str], expected: tuple[int, int] | None) -> None:
    assert started_by(environ) == expected


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, None),
        ({"devices": "auto", "num_nodes": 2}, None),
        ({"devices": -1}, None),
        ({"devices": 2}, 2),
        ({"devices": "2", "num_nodes": 3}, 6),
        ({"devices": [0, 3]}, 2),
        ({"devices": "0,3,"}, 2),
    ],
)
def test_how_many_were_asked_for(trainer: dict[str, Any], expected: int | None) -> None:
    assert asked_for(trainer) == expected


def test_one_process_does_not_train_for_two_that_were_started(
    words: Callable[..., tuple[str, ...]],
    methods: dict[str, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_recipe(None, *words(tmp_path / "run", *methods["lora"], "trainer.devices=1"))
    with pytest.raises(ConfigError, match="1 processes would train together, and what was started is 2"):
        fit(config, RunDirectory.of(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_starts_the_others(
    words: Callable[..., tuple[str, ...]],
    methods: dict[str, tuple[str, ...]],
    losses: Callable[[Path], list[float]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    more = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=3")
    command = [sys.executable, "-W", "ignore", "-m", "qtrain", "fit", *words(run, *methods["lora"], *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("training\n") == 1  # one of them speaks
    assert len(losses(run)) == 3
