"""The sweep files: W&B's own agent expands them, and each command line that it makes is one of qtrain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb import wandb_agent
from wandb.proto.wandb_internal_pb2 import Record

from qtrain.cli import main
from qtrain.config.compose import recipe_names
from qtrain.verbs.request import Request, read_request

SWEEPS = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))
ID = "q7x2"


def content(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def values_of(parameter: dict[str, Any]) -> list[Any]:
    """Each value, or both ends and the middle of a range."""
    if "min" in parameter:
        low, high = parameter["min"], parameter["max"]
        assert isinstance(low, float), "YAML 1.1 takes 1e-3 for text: 1.0e-3"
        return [low, math.sqrt(low * high), high]
    return parameter["values"] if "values" in parameter else [parameter["value"]]


def choices(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sets of values, in which each value of each parameter occurs."""
    columns = [values_of(parameter) for parameter in sweep["parameters"].values()]
    for row in zip_longest(*columns):
        filled = [column[0] if value is None else value for column, value in zip(columns, row, strict=True)]
        yield dict(zip(sweep["parameters"], filled, strict=True))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """What an agent would start for a run, with the environment that it would have."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], forward_signals: bool) -> None:
            commands.append(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.setenv("WANDB_SWEEP_ID", ID)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them, and they go with this test
        monkeypatch.setenv(name, "")

    def start(sweep: dict[str, Any], run_id: str, chosen: dict[str, Any]) -> list[str]:
        agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
        agent._sweep_command, agent._run_processes = list(sweep["command"]), {}
        agent._in_jupyter, agent._function, agent._forward_signals = False, None, False
        arguments = {name: {"value": value} for name, value in chosen.items()}
        agent._command_run({"run_id": run_id, "program": sweep["program"], "args": arguments})
        return commands[-1]

    return start


def request_of(command: list[str]) -> Request:
    assert command[:3] == ["/usr/bin/env", "qtrain", "fit"]
    return read_request("fit", command[3:])


def test_there_are_sweeps_and_they_are_no_recipes() -> None:
    assert {path.stem for path in SWEEPS} >= {"qlora_llama"}
    assert [path.name for path in SWEEPS] == sorted(f.name for f in (files("qtrain.recipes") / "sweeps").iterdir())
    assert recipe_names() == sorted(path.stem for path in (SWEEPS[0].parents[1]).glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_value_makes_a_command_that_qtrain_takes(path: Path, started: Callable[..., list[str]]) -> None:
    sweep = content(path)
    assert sweep["metric"].keys() == {"name", "goal"} and sweep["method"] in ("bayes", "random", "grid")
    runs = set()
    for number, chosen in enumerate(choices(sweep)):
        request = request_of(started(sweep, f"run{number}", chosen))
        for name, value in chosen.items():
            section, key = name.split(".")
            config = request.config
            resolved = config.trainer[key] if section == "trainer" else getattr(getattr(config, section), key)
            assert resolved == value and type(resolved) is type(value if key != "warmup" else 0.0), name
        assert request.config.wandb.enabled
        runs.add(request.run.path)
    assert len(runs) == number + 1
    assert all(run.parent == Path("runs", f"sweep-{ID}") for run in runs)


def test_other_kinds_of_values_are_taken_as_the_agent_writes_them(started: Callable[..., list[str]]) -> None:
    sweep = {"program": "qtrain", "command": ["${env}", "${program}", "fit", "${args_no_hyphens}"]}
    chosen = {"optimizer": {"lr": 1e-05, "betas": [0.9, 0.95]}, "data.train": ["a b.jsonl", "c.jsonl"]}
    config = request_of(started(sweep, "r1", chosen)).config
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-05, (0.9, 0.95))
    assert config.data.train == ["a b.jsonl", "c.jsonl"]


def test_a_directory_that_is_given_is_kept(started: Callable[..., list[str]]) -> None:
    sweep = {"program": "qtrain", "command": ["${env}", "${program}", "fit", "run.dir=there", "${args_no_hyphens}"]}
    assert request_of(started(sweep, "r1", {"method.r": 8})).run.path == Path("there")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
def test_a_run_of_it_trains_and_logs_what_the_sweep_looks_at(
    started: Callable[..., list[str]],
    tiny_llama_dir: Path,
    tmp_path: Path,
    fresh_wandb: pytest.MonkeyPatch,
    wandb_records: Callable[[Path], list[Record]],
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    sweep = content(SWEEPS[0])
    Path("chats.txt").write_text("The dog sleeps on.\n" * 40)
    small = [f"model.path={tiny_llama_dir}", "data.train=chats.txt", "data.validation=chats.txt", "data.max_length=32"]
    sweep["command"] = [*sweep["command"], *small, "trainer.max_steps=2", "trainer.accumulate_grad_batches=1"]
    chosen = {name: values_of(parameter)[0] for name, parameter in sweep["parameters"].items()}
    assert main(started(sweep, "a1b2", chosen)[2:]) == 0
    directory = tmp_path / "runs" / f"sweep-{ID}" / "qlora_llama-a1b2"
    assert (directory / "adapter").is_dir()
    (file,) = directory.glob("wandb/offline-run-*-a1b2/*.wandb")
    written = wandb_records(file)
    run = next(record.run for record in written if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.sweep_id, run.display_name) == ("a1b2", ID, "qlora_llama-a1b2")
    logged = [
        json.loads(item.value_json)
        for record in written
        for item in record.history.item
        if (item.key or ".".join(item.nested_key)) == sweep["metric"]["name"]
    ]
    assert len(logged) >= 2 and all(math.isfinite(value) for value in logged)
    after = json.loads((directory / "fit.json").read_text())["val_loss_after"]
    assert logged[-1] == pytest.approx(after)
