"""metrics.csv across resumes, and a W&B run written offline and read back from its own file."""

from __future__ import annotations

import builtins
import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import Logger, WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from qtrain.config.schema import Config
from qtrain.export.config import ExportSection
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.training.metrics_file import MetricsFile
from qtrain.training.tracking import loggers


def config(**sections: Any) -> Config:
    return Config(method=QLoraOptions(r=4), export=ExportSection(), **sections)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_steps(logger: Logger, steps: range, **metrics: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 8, **metrics}, step=step)
        logger.save()


# --- metrics.csv


def test_rows_are_on_disk_after_each_save_and_new_columns_extend_old_rows(tmp_path: Path) -> None:
    (logger,) = loggers(config(), tmp_path)
    log_steps(logger, range(2))
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0.0\n1,0.125\n"
    logger.log_metrics({"val_loss": 2.5, "epoch": 0}, step=1)
    logger.save()
    log_steps(logger, range(2, 3))
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,loss,val_loss,epoch\n0,0.0,,\n1,0.125,,\n1,,2.5,0.0\n2,0.25,,\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    log_steps(loggers(config(), tmp_path)[0], range(3), old=1.0)
    log_steps(loggers(config(), tmp_path)[0], range(2))
    assert rows(tmp_path / "metrics.csv") == [{"step": "0", "loss": "0.0"}, {"step": "1", "loss": "0.125"}]


@pytest.mark.parametrize("resume_step", [6, None])
def test_a_resumed_run_repeats_no_row(tmp_path: Path, resume_step: int | None) -> None:
    log_steps(loggers(config(), tmp_path)[0], range(10), old=1.0)
    (logger,) = loggers(config(run={"resume": True}), tmp_path, resume_step)
    log_steps(logger, range(6, 12), new=2.0)
    written = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in written] == list(range(12))
    assert [row["old"] for row in written] == ["1.0"] * 6 + [""] * 6
    assert [row["new"] for row in written] == [""] * 6 + ["2.0"] * 6


def test_the_checkpoints_step_counts_where_the_first_row_comes_later(tmp_path: Path) -> None:
    log_steps(loggers(config(), tmp_path)[0], range(10))
    (logger,) = loggers(config(run={"resume": True}), tmp_path, 6)
    log_steps(logger, range(9, 10))
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 4, 5, 9]


@given(cut=st.integers(min_value=0, max_value=40), resume_step=st.integers(min_value=0, max_value=5))
def test_a_file_cut_anywhere_by_a_kill_is_taken_up(
    tmp_path_factory: pytest.TempPathFactory, cut: int, resume_step: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.csv"
    log_steps(MetricsFile(path), range(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = max(0, whole[:cut].count(b"\n") - 1)
    log_steps(MetricsFile(path, keep_below=resume_step), range(resume_step, 6))
    expected = [*range(min(complete, resume_step)), *range(resume_step, 6)]
    assert [(int(row["step"]), float(row["loss"])) for row in rows(path)] == [(s, s / 8) for s in expected]


class Line(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # four rows need none
# torch 2.13 deprecates LeafSpec, lightning 2.6.6 asks for it.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_the_trainer_writes_to_it_and_takes_its_directory(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        log_every_n_steps=2,
        logger=loggers(config(), tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(4, 2)))  # type: ignore[arg-type]
    assert trainer.log_dir == str(tmp_path)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "3"]


# --- Weights & Biases


def test_an_offline_run_holds_config_metrics_and_table(
    fresh_wandb: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    wandb_records: Callable[[Path], list[Record]],
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    settings = config(run={"name": "a run/1"}, wandb={"enabled": True, "project": "bench", "tags": ["int4"]})
    both = loggers(settings, tmp_path / "run")
    wandb_logger = both[1]
    assert isinstance(wandb_logger, WandbLogger)
    log_steps(wandb_logger, range(3), lr=0.5)
    wandb_logger.log_table("samples", columns=["prompt", "answer"], data=[["3 in in mm?", "76.2 mm"]], step=2)
    run_id = wandb_logger.version
    wandb.finish()
    wandb.teardown()  # the service writes the file out when it ends

    (file,) = (tmp_path / "run").glob(f"wandb/offline-run-*-{run_id}/*.wandb")
    written = wandb_records(file)
    run = next(record.run for record in written if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.project, list(run.tags)) == ("a run/1", "bench", ["int4"])

    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    expected = settings.model_dump(mode="json")
    assert {key: logged[key] for key in expected} == expected
    assert logged["method"]["r"] == 4

    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in written
        if record.WhichOneof("record_type") == "history"
    ]
    figures = [(row["trainer/global_step"], row["loss"], row["lr"]) for row in history if "loss" in row]
    assert figures == [(0, 0.0, 0.5), (1, 0.125, 0.5), (2, 0.25, 0.5)]

    (table_row,) = (row for row in history if any(key.startswith("samples") for key in row))
    table_path = table_row["samples"]["path"] if "samples" in table_row else table_row["samples.path"]
    table = json.loads((file.parent / "files" / table_path).read_text())
    assert (table["columns"], table["data"]) == (["prompt", "answer"], [["3 in in mm?", "76.2 mm"]])

    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_goes_on_under_its_id(fresh_wandb: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    ids = []
    for resume in (False, True, False):
        settings = config(run={"resume": resume}, wandb={"enabled": True})
        ids.append(loggers(settings, tmp_path / "run")[1].version)
        wandb.finish()
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": ids[2], "name": "run"}


def only_csv(settings: Config, directory: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The one line that is said while `loggers` gives CSV alone, and that works."""
    with caplog.at_level(logging.INFO, logger="qtrain"):
        (logger,) = loggers(settings, directory)
    log_steps(logger, range(1))
    assert len(rows(directory / "metrics.csv")) == 1
    (said,) = caplog.messages
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("key", "reason"), [(None, "no API key"), ("abc", "WANDB_API_KEY invalid")])
def test_online_without_a_key_goes_on_with_csv(
    fresh_wandb: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str | None, reason: str
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "online")
    if key:
        fresh_wandb.setenv("WANDB_API_KEY", key)
    assert reason in only_csv(config(wandb={"enabled": True}), tmp_path, caplog)


def test_without_the_package_goes_on_with_csv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install wandb" in only_csv(config(wandb={"enabled": True}), tmp_path, caplog)
