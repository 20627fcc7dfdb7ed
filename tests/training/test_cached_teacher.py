"""A teacher in files: the same training as with one that runs beside it, in the memory of one model."""

from __future__ import annotations

import csv
import json
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.distill.teacher import teacher_model
from qtrain.errors import ConfigError, DataError
from qtrain.training import fit as fitting
from qtrain.training import module as modules
from qtrain.training.fit import fit
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]
CACHED = ("distill.teacher_logits=cached", "distill.top_k=512")


def write_text(path: Path, times: int = 3) -> None:
    lines = [{"text": f"the dog {'and the fox ' * (n % 4)}sleeps {n * times} times"} for n in range(44)]
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def words(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[str, ...]:
    write_text(tmp_path / "train.jsonl")
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # as it is, all tokens are equally likely
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return (
        f"model.path={tmp_path / 'model'}",
        *(f"data.train={tmp_path / 'train.jsonl'}", "data.max_length=48", "data.batch_size=2"),
        *("method.name=qat", "method.weight={format: int4}", "distill.loss=forward_kl", "optimizer.lr=1e-3"),
        *("trainer.accelerator=cpu", "trainer.accumulate_grad_batches=2", "trainer.max_steps=6"),
        "trainer.max_epochs=-1",
    )


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[PreTrainedModel]]:
    """Every teacher that was made."""
    made: list[weakref.ref[PreTrainedModel]] = []

    def watched(*given: Any) -> PreTrainedModel:
        model = teacher_model(*given)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(modules, "teacher_model", watched)
    return made


def train(run: Path, *words: str) -> None:
    config = load_recipe(None, *words, f"run.dir={run}")
    fit(config, RunDirectory.of(config))


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def written(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}


@pytest.mark.parametrize("keys", [(), ("data.packing=false",), ("distill.loss=jsd", "distill.temperature=2")])
def test_the_whole_vocabulary_in_files_is_the_teacher_itself(
    keys: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    keys = (*keys, "optimizer.lr=3e-5")  # Adam and rounding make much of small differences
    train(tmp_path / "online", *words, *keys)
    train(tmp_path / "cached", *words, *keys, *CACHED)
    online, cached = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert len(online) == 6 and min(online) > 0.005 and len(set(online)) == 6
    assert cached == pytest.approx(online, rel=1e-3)
    assert "from cached logits" in json.loads((tmp_path / "cached" / "fit.json").read_text())["loss_path"]


def test_the_training_holds_one_model(
    words: tuple[str, ...],
    tmp_path: Path,
    teachers: list[weakref.ref[PreTrainedModel]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alive: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            alive.extend(teacher() is not None for teacher in teachers)

    chosen = fitting._callbacks
    monkeypatch.setattr(fitting, "_callbacks", lambda *given: [*chosen(*given), Look()])
    steps = ("trainer.max_steps=1", "trainer.accumulate_grad_batches=1")
    train(tmp_path / "one", *words, *CACHED, *steps)
    assert alive == [False]
    assert "512 of 512 logits for each token of 19 rows, 1.5 MiB in" in capsys.readouterr().out
    train(tmp_path / "blocks", *words, *CACHED, *steps, "distill.layerwise={steps: 2, rows: 4}")
    assert alive == [False, False, False] and len(teachers) == 2


def test_a_run_that_is_cut_off_in_an_epoch_goes_on_with_the_cache(words: tuple[str, ...], tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    keys = (*words, *CACHED, "distill.top_k=16", "run.save_every=2")
    train(straight, *keys)
    train(halves, *keys)
    for file in (halves / "checkpoints").iterdir():
        if file.name != "step-000004.ckpt":
            file.unlink()  # as if it had been killed after its fourth step
    before = written(halves / "teacher_logits")
    train(halves, *keys, "run.resume=true")
    assert written(halves / "teacher_logits") == before
    assert losses(straight) == losses(halves)
    one, two = (load_file(run / "weights" / "model.safetensors") for run in (straight, halves))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_cache_serves_every_order_and_batch_size_and_no_other_rows(
    words: tuple[str, ...], tmp_path: Path, teachers: list[weakref.ref[PreTrainedModel]]
) -> None:
    shared = (*words, *CACHED, f"distill.cache_dir={tmp_path / 'cache'}", "trainer.max_steps=1")
    train(tmp_path / "first", *shared)
    before = written(tmp_path / "cache")
    train(tmp_path / "second", *shared, "run.seed=5", "data.batch_size=3", "data.shuffle=false", "optimizer.lr=1e-2")
    assert written(tmp_path / "cache") == before and len(teachers) == 1
    with pytest.raises(DataError, match="another distill.top_k: top_k is 512 there, 8 here"):
        train(tmp_path / "third", *shared, "distill.top_k=8", "run.overwrite=true")
    for packed_otherwise in ("data.max_length=40", "data.packing=false"):
        with pytest.raises(DataError, match="other training rows"):
            train(tmp_path / "third", *shared, packed_otherwise)
    write_text(tmp_path / "train.jsonl", times=4)
    with pytest.raises(DataError, match="other training rows") as refused:
        train(tmp_path / "third", *shared)
    assert "distill.cache_dir=DIR" in refused.value.message() and written(tmp_path / "cache") == before
    assert not (tmp_path / "third").exists()


def test_overwriting_a_run_keeps_its_cache_if_it_fits(words: tuple[str, ...], tmp_path: Path) -> None:
    run, keys = tmp_path / "run", (*words, *CACHED, "trainer.max_steps=1")
    train(run, *keys)
    before = written(run / "teacher_logits")
    train(run, *keys, "run.overwrite=true", "optimizer.lr=1e-2")
    assert written(run / "teacher_logits") == before
    with pytest.raises(DataError, match="another distill.temperature"):
        train(run, *keys, "run.resume=true", "trainer.max_steps=2", "distill.temperature=2")
    train(run, *keys, "run.overwrite=true", "distill.temperature=2")
    assert json.loads((run / "teacher_logits" / "manifest.json").read_text())["temperature"] == 2


def test_what_cannot_be_cached_is_refused(
    words: tuple[str, ...], tmp_path: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(None, *words, *CACHED, f"run.dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match="data.streaming=true"):
        LanguageModule(load_recipe(None, *words, *CACHED, "data.streaming=true"))
    with pytest.raises(ConfigError, match="without the training data"):
        LanguageModule(config).build(torch.device("cpu"))
    with pytest.raises(ConfigError, match="handed over"):
        module = LanguageModule(config, base=tiny_llama)
        module.build(torch.device("cpu"), LanguageData(config.data, module.tokenizer))
    module, trainer = LanguageModule(config), L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    module.trainer = trainer
    with pytest.raises(ConfigError, match="2 processes, and no finished cache"):
        module.build(torch.device("cpu"), LanguageData(config.data, module.tokenizer))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    module = LanguageModule(config)
    with pytest.raises(DataError, match="0.0 are free"):
        module.build(torch.device("cpu"), LanguageData(config.data, module.tokenizer))
    assert not (tmp_path / "run").exists()


def test_with_a_trainer_of_ones_own(words: tuple[str, ...], tmp_path: Path) -> None:
    config = load_recipe(None, *words, *CACHED, f"run.dir={tmp_path / 'run'}")
    module = LanguageModule(config)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=LanguageData(config.data, module.tokenizer))
    assert "cached logits" in module.loss_path and len(module.cache or ()) > 8
