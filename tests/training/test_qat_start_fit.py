"""Fits that begin at a starting point: found once, resumed to the bit, measured against what was before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.config.compose import load_recipe
from qtrain.evaluation.recovery import recovery_of
from qtrain.methods.qat import method as qat
from qtrain.methods.qat.start import begin_at
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
]
STARTS = {
    "gptq": ("method.init=gptq", "method.weight={format: int4, range: learned, group_size: 32}"),
    "awq, static": ("method.init=awq", "method.weight={format: int3, range: static, symmetric: false, group_size: 32}"),
    "smoothquant": ("method.init=smoothquant", "method.weight.format=int8", "method.activation.format=int8"),
}


@pytest.fixture
def words(tiny_llama_dir: Path, tmp_path: Path) -> tuple[str, ...]:
    text = "\n".join(f"the dog {'and the fox ' * (n % 3)}sleeps {n} times, and wakes {n + 1} times" for n in range(40))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "held_out.txt").write_text("the fox jumps over the dog, 3 integers map to 4 scales")
    return (
        *(f"model.path={tiny_llama_dir}", f"data.train={tmp_path / 'train.txt'}"),
        *(f"data.validation={tmp_path / 'held_out.txt'}", "data.max_length=32", "data.batch_size=2"),
        *("method.name=qat", "optimizer.lr=1e-3", "trainer.accelerator=cpu", "trainer.accumulate_grad_batches=1"),
        *("run.save_every=2", "run.keep=9"),
    )


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The starting points that ran."""
    ran: list[str] = []

    def counted(model: Any, options: Any, **keys: Any) -> list[str]:
        ran.append(options.init)
        return begin_at(model, options, **keys)

    monkeypatch.setattr(qat, "begin_at", counted)
    return ran


def train(*words: str, steps: int = 4, resume: bool = False) -> dict[str, Any]:
    config = load_recipe(None, *words, f"trainer.max_steps={steps}", f"run.resume={str(resume).lower()}")
    return fit(config, RunDirectory.of(config))


@pytest.mark.parametrize("keys", STARTS.values(), ids=STARTS)
def test_a_resumed_fit_goes_on_to_the_bit_without_another_start(
    keys: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, starts: list[str]
) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    whole = train(*words, *keys, f"run.dir={straight}")
    train(*words, *keys, f"run.dir={halves}")
    for path in (halves / "checkpoints").glob("step-000004*"):
        path.unlink()  # as if it had been killed after its second step
    assert len(starts) == 2
    figures = train(*words, *keys, f"run.dir={halves}", resume=True)
    assert len(starts) == 2
    one, two = (load_file(run / "weights" / "model.safetensors") for run in (straight, halves))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert figures["recovery"] == whole["recovery"] and figures["init"] == starts[0]


@pytest.mark.parametrize("keys", STARTS.values(), ids=STARTS)
def test_the_table_has_the_model_before_the_start_and_the_start_itself(
    keys: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    plain = train(*words, *keys, "method.init=null", f"run.dir={tmp_path / 'plain'}", steps=1)
    begun = train(*words, *keys, f"run.dir={tmp_path / 'begun'}", steps=1)
    assert begun["recovery"]["full"] == plain["recovery"]["full"]
    # Nothing is calibrated beside the start here, so that what training begins with is what the start made.
    assert begun["recovery"]["ptq"] == begun["val_perplexity_before"] != plain["recovery"]["ptq"]
    assert set(begun["recovery"]) == {"full", "ptq", "qat", "share"} and "init" not in plain
    recovery = recovery_of(json.loads((tmp_path / "begun" / "fit.json").read_text()))
    assert recovery is not None and recovery.rows()[1][0] == f"PTQ ({begun['init']})"
    assert f"PTQ ({begun['init']})" in (tmp_path / "begun" / "report.html").read_text()


def test_a_teacher_is_the_model_before_the_start(words: tuple[str, ...], tmp_path: Path) -> None:
    keys = (*words, *STARTS["gptq"], "distill.loss=forward_kl", "run.resume=false")
    config = load_recipe(None, *keys, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=2")
    figures = fit(config, RunDirectory.of(config))
    plain = train(*words, "method.weight.format=int4", f"run.dir={tmp_path / 'plain'}", steps=1)
    assert figures["recovery"]["full"] == plain["recovery"]["full"] and "teacher" in figures["loss_path"]
