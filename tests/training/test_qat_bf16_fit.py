"""Quantization-aware fits with weights in bf16: resumed to the bit, as good as fp32, refused where they would lose."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
]
IN_BF16 = ("method.weight_storage=bf16", "optimizer.name=adamw_16bit")


@pytest.fixture
def words(tiny_llama_dir: Path, tmp_path: Path) -> tuple[str, ...]:
    lines = (f"the dog {'and the fox ' * (n % 3)}sleeps {n} times, 2 scales map {n + 1} integers" for n in range(40))
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "held_out.txt").write_text("the fox jumps over the dog, 3 integers map to 4 scales")
    return (
        f"model.path={tiny_llama_dir}",
        f"data.train={tmp_path / 'train.txt'}",
        f"data.validation={tmp_path / 'held_out.txt'}",
        *("data.max_length=32", "data.batch_size=2", "method.name=qat", "optimizer.lr=1e-3"),
        *("method.weight={format: int4, range: learned}", "method.activation.format=int8"),
        *("method.compute_dtype=bf16", "trainer.accelerator=cpu", "trainer.accumulate_grad_batches=2"),
        "trainer.gradient_clip_val=1.0",
    )


def train(*words: str) -> dict[str, Any]:
    config = load_recipe(None, *words)
    return fit(config, RunDirectory.of(config))


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_16bit"])
def test_three_steps_and_three_more_are_six(optimizer: str, words: tuple[str, ...], tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    words = (*words, *IN_BF16, f"optimizer.name={optimizer}", "trainer.max_epochs=-1")
    train(*words, f"run.dir={straight}", "trainer.max_steps=6")
    train(*words, f"run.dir={halves}", "trainer.max_steps=3")
    train(*words, f"run.dir={halves}", "trainer.max_steps=6", "run.resume=true")
    one, two = (load_file(run / "weights" / "model.safetensors") for run in (straight, halves))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16, torch.float32}
    assert losses(straight) == losses(halves)


def test_it_learns_as_in_fp32(words: tuple[str, ...], tmp_path: Path) -> None:
    found = {}
    for name, keys in {"fp32": (), "bf16": IN_BF16}.items():
        run = tmp_path / name
        found[name] = train(*words, *keys, f"run.dir={run}", "trainer.max_steps=20", "trainer.max_epochs=-1")
    loss = {name: figures["val_loss_after"] for name, figures in found.items()}
    assert loss["fp32"] < 0.9 * found["fp32"]["val_loss_before"]
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=0.01)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["optimizer.name=adamw_8bit"], "adamw_16bit"),
        (["method.compute_dtype=fp32"], "products in fp32 on cpu"),
        (["distill.layerwise.steps=2"], "distill.layerwise"),
    ],
)
def test_what_would_lose_updates_is_refused(keys: list[str], said: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train(*words, *IN_BF16, *keys, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=2")
