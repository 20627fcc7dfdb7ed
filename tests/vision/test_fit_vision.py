"""`qtrain fit task=vision`: from idx files to a run directory, resumed where it was cut off."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import qtrain
from qtrain.cli import main
from qtrain.config.compose import load_recipe, save_config
from qtrain.config.schema import VisionConfig
from qtrain.errors import ConfigError, ErrorList
from qtrain.training.fit_vision import build_model
from qtrain.vision.config import VisionModelSection

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def words(fashion: Path, run: Path, *more: str) -> list[str]:
    return [
        *("task=vision", f"data.path={fashion}", "data.batch_size=16", "data.validation_share=0.25"),
        *(
            "model.architecture=resnet8",
            "model.width=4",
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=2",
            f"run.dir={run}",
            *more,
        ),
    ]


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_from_files_to_a_report(fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    more = ("trainer.max_epochs=20", "data.augment=false", "data.batch_size=8", "run.name=stripes")
    assert main(["fit", *words(fashion, run, *more)]) == 0
    shown = capsys.readouterr().out
    assert "48 train, 16 validation, 20 test" in shown and "images/s" in shown and "qtrain export" not in shown
    figures = json.loads((run / "fit.json").read_text())
    assert figures["steps"] == 20 * 6
    assert figures["test_accuracy"] > 0.5 and figures["val_accuracy"] > 0.5  # 0.1 is chance
    assert figures["test_loss"] < 2.3
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.csv",
        "data.json",
        "report.html",
        "weights",
    }
    with (run / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"train/loss", "train/lr", "val/loss", "val/accuracy", "test/accuracy"} <= set(columns)
    report = (run / "report.html").read_text()
    assert "accuracy" in report and "nats a token" not in report and "perplexity" not in report
    model = build_model(VisionModelSection(architecture="resnet8", width=4))
    model.load_state_dict(load_file(run / "weights" / "model.safetensors"))
    assert len(list((run / "checkpoints").glob("*.ckpt"))) == 2

    repeated = tmp_path / "again"
    assert main(["fit", f"recipe={run / 'config.yaml'}", f"run.dir={repeated}"]) == 0
    assert losses(repeated) == losses(run)
    assert main(["fit", f"run.dir={run}"]) == 2
    assert "an earlier run lies here" in capsys.readouterr().err


@pytest.mark.parametrize("save_every", [0, 4])
def test_a_run_that_goes_on_ends_where_an_undisturbed_one_does(fashion: Path, tmp_path: Path, save_every: int) -> None:
    more = (f"run.save_every={save_every}", "trainer.max_epochs=-1", "trainer.log_every_n_steps=1")
    # Three steps an epoch: 4 is in the middle of the second. The schedule ends at max_steps, so that stays the same.
    straight, halves = (words(fashion, tmp_path / name, *more, "trainer.max_steps=9") for name in ("one", "two"))
    qtrain.fit(load_recipe(None, *straight))
    cut = 4 if save_every else 3
    qtrain.fit(load_recipe(None, *halves))
    kept = tmp_path / "two" / "checkpoints" / "kept.ckpt"
    full = load_recipe(
        None, *words(fashion, tmp_path / "two", *more, "trainer.max_steps=9", "run.keep=9", "run.overwrite=true")
    )
    qtrain.fit(full)
    (tmp_path / "two" / "checkpoints" / f"step-{cut:06d}.ckpt").rename(kept)
    figures = qtrain.fit(load_recipe(None, *halves, f"run.resume={kept}"))
    assert figures["steps"] == 9
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_held_out_images(fashion: Path, tmp_path: Path) -> None:
    settings = words(fashion, tmp_path / "run", "data.validation_share=0", "trainer.max_steps=1")
    figures = qtrain.fit(load_recipe(None, *settings))
    assert "val_accuracy" not in figures and "test_accuracy" in figures


def test_a_length_that_is_not_known_is_refused(fashion: Path, tmp_path: Path) -> None:
    config = load_recipe(
        None, *words(fashion, tmp_path / "run", "trainer.max_time=00:00:01:00", "trainer.max_epochs=-1")
    )
    with pytest.raises(ConfigError, match="number of steps is not known"):
        qtrain.fit(config)
    assert not (tmp_path / "run").exists()


def messages(*overrides: str) -> list[str]:
    with pytest.raises(ErrorList) as caught:
        load_recipe(None, *overrides)
    return [error.message() for error in caught.value.errors]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.widht=8", "did you mean 'width'?"),
        ("data.batchsize=8", "did you mean 'batch_size'?"),
        ("optimizer.momentun=0.5", "did you mean 'momentum'?"),
        ("optimizer.betas=[0.9,0.99]", "optimizer.betas is no key of 'optimizer'"),
        ("method.name=nonne", "did you mean 'none'?"),
        ("model.architecture=resnet21", "resnet20"),
        ("data.validation_share=1", "< 1"),
        ("optimizer.name=adamw", "sgd"),
        ("run.samples=[a]", "run.samples is no key of 'run'"),
        ("export.format=merged", "'export' is no section"),
        ("trainer.max_epoch=3", "did you mean 'max_epochs'?"),
    ],
)
def test_mistakes_in_vision_sections(override: str, hint: str) -> None:
    (message,) = messages("task=vision", override)
    assert hint in message


def test_an_unknown_task() -> None:
    (message,) = messages("task=visoin", "model.width=8")
    assert "task=visoin is unknown" in message and "did you mean 'vision'?" in message


def test_a_recipe_of_the_task_by_file(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("task: vision\nmodel: {width: 8}\ntrainer: {max_epochs: 3}\n")
    config = load_recipe(recipe, "optimizer.lr=0.05")
    assert isinstance(config, VisionConfig)
    assert (config.model.width, config.optimizer.lr, config.method.name) == (8, 0.05, "none")
    assert config.trainer == {"max_epochs": 3}
    save_config(config, tmp_path / "config.yaml")
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text()))[:4] == ["task", "recipe", "model", "data"]
    assert load_recipe(tmp_path / "config.yaml") == config


def test_other_verbs_say_that_they_do_not_serve_it(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *words(fashion, tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "`qtrain validate` does not serve task vision" in message and "there is: fit" in message


def test_missing_files_are_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "task=vision", f"data.path={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert "train-images-idx3-ubyte[.gz]" in message and "apt install dataset-fashion-mnist" in message


def test_help_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "task=vision", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "model.architecture" in shown and "data.augment" in shown and "optimizer.momentum" in shown
    assert "model.path" not in shown and "method.lora_alpha" not in shown
    assert main(["fit", "--help"]) == 0
    assert "task=vision --help" in capsys.readouterr().out
