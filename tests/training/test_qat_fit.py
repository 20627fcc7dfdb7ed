"""Quantization-aware fits: cut off and resumed to the bit, schedules followed, the table at the end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from qtrain.config.compose import load_recipe
from qtrain.errors import CheckpointError, ConfigError
from qtrain.modules.quantizers import quantizers
from qtrain.training import fit as fitting
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
]
W4A8KV4 = (
    "method.weight={format: int4, range: learned, calibrate: mse}",
    "method.activation={format: int8, range: static, calibrate: kl}",
    "method.kv_cache={format: int4, symmetric: false, site: pre_rope, share: per_token}",
    "method.scale_lr=1e-3",
    "distill.loss=forward_kl",
)
SCHEDULE = (
    "method.weight={format: int4, range: learned}",
    "method.activation={format: int8, range: static}",
    "method.start_step=2",
    "method.bits_schedule={0: int8, 4: int4}",
    "method.freeze_ranges_step=6",
)


@pytest.fixture
def words(tiny_llama_dir: Path, tmp_path: Path) -> tuple[str, ...]:
    text = "\n".join(
        f"the dog {'and the fox ' * (n % 3)}sleeps {n} times, 2 scales map {n + 1} integers" for n in range(40)
    )
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "held_out.txt").write_text("the fox jumps over the dog, 3 integers map to 4 scales")
    return (
        f"model.path={tiny_llama_dir}",
        f"data.train={tmp_path / 'train.txt'}",
        f"data.validation={tmp_path / 'held_out.txt'}",
        *("data.max_length=32", "data.batch_size=2", "method.name=qat", "optimizer.lr=1e-3"),
        *("trainer.accelerator=cpu", "trainer.accumulate_grad_batches=2"),
    )


def train(*words: str, steps: int, resume: bool = False) -> dict[str, Any]:
    config = load_recipe(None, *words, f"trainer.max_steps={steps}", f"run.resume={str(resume).lower()}")
    return fit(config, RunDirectory.of(config))


def column(run: Path, name: str) -> list[tuple[int, float]]:
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "weights" / "model.safetensors")


@pytest.mark.parametrize("keys", [W4A8KV4, (*W4A8KV4, "method.lora.r=4"), SCHEDULE], ids=["all", "lora", "schedule"])
def test_three_steps_and_three_more_are_six(keys: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    keys = (*keys, "run.save_every=3", "run.keep=9")
    train(*words, *keys, f"run.dir={straight}", steps=7)
    train(*words, *keys, f"run.dir={halves}", steps=7)
    for file in (halves / "checkpoints").iterdir():
        if file.name != "step-000003.ckpt":
            file.unlink()  # as if it had been killed after its third step
    half = torch.load(halves / "checkpoints" / "step-000003.ckpt", weights_only=True)["state_dict"]
    figures = train(*words, *keys, f"run.dir={halves}", steps=7, resume=True)
    one, two = weights(straight), weights(halves)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    learned = [name for name in one if name.endswith("weight_quantizer.scale")]
    assert len(learned) == 14 and not any(torch.equal(one[name], half[f"model.{name}"]) for name in learned)
    assert column(straight, "train/loss") == column(halves, "train/loss")
    fit_of_the_straight = json.loads((straight / "fit.json").read_text())
    assert figures["recovery"] == fit_of_the_straight["recovery"]
    assert figures["val_perplexity_before"] == fit_of_the_straight["val_perplexity_before"]


class Watch(Callback):
    """What holds in the forward passes that lead to step s + 1."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[bool, str, float]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        quantizer = next(quantizer for _, quantizer in quantizers(pl_module) if quantizer.for_weight)
        scale = float(quantizer.scale.detach().sum())  # type: ignore[union-attr]
        self.seen[trainer.global_step] = (quantizer.enabled, quantizer.spec.format, scale)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, chosen = Watch(), fitting._callbacks
    monkeypatch.setattr(fitting, "_callbacks", lambda *given: [*chosen(*given), watch])
    return watch


def test_a_schedule_is_followed_and_logged(
    words: tuple[str, ...], tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(*words, *SCHEDULE, f"run.dir={run}", "optimizer.weight_decay=0.1", steps=8)
    assert [watch.seen[step][0] for step in range(8)] == [False] * 2 + [True] * 6
    assert [watch.seen[step][1] for step in range(8)] == ["int8"] * 4 + ["int4"] * 4
    assert watch.seen[4][2] != watch.seen[5][2] and watch.seen[6][2] == watch.seen[7][2]
    assert column(run, "quantization/on") == [(0, 0.0), (2, 1.0), (4, 1.0), (6, 1.0)]
    assert column(run, "quantization/weight_bits") == [(0, 8.0), (2, 8.0), (4, 4.0), (6, 4.0)]
    assert column(run, "quantization/ranges_frozen")[-1] == (6, 1.0)
    said = capsys.readouterr().out
    for line in ("step 2: quantization on", "step 4: weights int8 -> int4", "step 6: learned ranges frozen"):
        assert line in said


def test_a_late_start_begins_with_the_ranges_of_then(words: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    late = ("method.weight={format: int4, range: learned}", "method.activation={format: int8, range: static}")
    train(*words, *late, "method.start_step=3", "run.save_every=3", "optimizer.lr=3e-2", f"run.dir={run}", steps=4)
    state = torch.load(run / "checkpoints" / "step-000003.ckpt", weights_only=True)["state_dict"]
    name = "model.model.layers.0.mlp.up_proj"
    extremes = state[f"{name}.weight"].abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(state[f"{name}.weight_quantizer.scale"] * 7, extremes, rtol=0.01, atol=0)
    begun = load_recipe(run / "config.yaml").model_copy(deep=True)
    assert begun.method.start_step == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_after_a_resume_the_schedule_is_where_it_was(
    stop: int, words: tuple[str, ...], tmp_path: Path, watch: Watch
) -> None:
    keys = (*SCHEDULE, f"run.dir={tmp_path / 'run'}", f"run.save_every={stop}", "run.keep=9")
    train(*words, *keys, steps=8)
    first = dict(watch.seen)
    watch.seen.clear()
    newest = f"run.resume={tmp_path / 'run' / 'checkpoints' / f'step-00000{stop}.ckpt'}"
    config = load_recipe(None, *words, *keys, "trainer.max_steps=9", newest)
    fit(config, RunDirectory.of(config))
    assert {step: first[step] for step in range(stop, 8)} == {step: watch.seen[step] for step in range(stop, 8)}


@pytest.mark.parametrize("late", ["method.start_step=4", "method.bits_schedule={0: int8, 4: int4}"])
def test_training_that_ends_before_its_schedule_is_refused(late: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends after 4 steps.*from step 4 on"):
        train(*words, late, f"run.dir={tmp_path / 'run'}", steps=4)


def test_training_that_is_cut_short_is_measured_and_saved_as_it_will_be_deployed(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 1

    chosen = fitting._callbacks
    monkeypatch.setattr(fitting, "_callbacks", lambda *given: [*chosen(*given), Stop()])
    train(*words, *SCHEDULE, f"run.dir={tmp_path / 'run'}", steps=8)
    assert "training ended before its schedule" in capsys.readouterr().out
    specs = json.loads((tmp_path / "run" / "weights" / "quantizers.json").read_text())
    assert {spec["format"] for name, spec in specs.items() if name.endswith("weight_quantizer")} == {"int4"}


def test_the_table_at_the_end_and_curves_without_the_baselines(words: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = train(*words, *W4A8KV4, f"run.dir={run}", steps=2)
    found = figures["recovery"]
    assert set(found) == {"full", "ptq", "qat", "share"}
    assert found["qat"] == figures["val_perplexity_after"]
    assert len({found["full"], found["ptq"], figures["val_perplexity_before"]}) == 3
    held_out = column(run, "val/perplexity")
    assert [step for step, _ in held_out].count(0) == 1
    assert held_out[0][1] == pytest.approx(figures["val_perplexity_before"])
    assert json.loads((run / "fit.json").read_text())["recovery"] == found
    assert column(run, "recovery/qat") == [(2, pytest.approx(found["qat"]))]


def test_a_checkpoint_of_other_quantizers_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(*words, *W4A8KV4, f"run.dir={run}", steps=2)
    with pytest.raises(CheckpointError, match="weight_quantizer.scale"):
        train(*words, *W4A8KV4, "method.weight.group_size=32", f"run.dir={run}", steps=4, resume=True)
