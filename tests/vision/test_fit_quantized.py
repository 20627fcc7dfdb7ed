"""`qtrain fit task=vision method.name=qat`: PACT by recipe, from random or given weights, cut off and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qtrain
from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.errors import CheckpointError, ConfigError, ModelError
from qtrain.modules.quant_activation import PactActivation
from qtrain.training.fit_vision import build_model
from qtrain.training.image_quantization import quantization
from qtrain.vision.classifier import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def words(fashion: Path, run: Path, *more: str) -> list[str]:
    small = ("model.architecture=resnet8", "model.width=4", "data.batch_size=8", "data.augment=false")
    held = ("data.validation_share=0.25", "trainer.accelerator=cpu", "trainer.log_every_n_steps=2")
    return [f"data.path={fashion}", *small, *held, f"run.dir={run}", *more]


def config(fashion: Path, run: Path, *more: str) -> Any:
    return load_recipe("pact_fashion_mnist", *words(fashion, run, *more))


def rows(run: Path, column: str) -> list[tuple[str, str]]:
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    at = lines[0].index(column)
    return [(line[lines[0].index("step")], line[at]) for line in lines[1:] if line[at]]


def test_the_recipe_from_files_to_a_report(fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["fit", "recipe=pact_fashion_mnist", *words(fashion, run, "trainer.max_epochs=20")]) == 0
    shown = capsys.readouterr().out
    assert "weights int8 x 2, int4 x 6; activations int8 x 2, int4 x 7" in shown
    assert "int4 symmetric, per_channel, learned" in shown and "accuracy, test images" in shown
    assert "nothing to round to nearest" in shown and "share recovered" not in shown
    figures = json.loads((run / "fit.json").read_text())
    assert figures["test_accuracy"] > 0.5  # 0.1 is chance
    assert figures["recovery"] == {"full": None, "ptq": None, "qat": figures["test_accuracy"], "share": None}
    kept = load_file(run / "weights" / "model.safetensors")
    specs = json.loads((run / "weights" / "quantizers.json").read_text())
    assert specs["stage1.0.conv1.weight_quantizer"]["format"] == "int4"
    alphas = {name: value.item() for name, value in kept.items() if name.endswith("alpha")}
    assert len(alphas) == 7 and all(0 < value < 20 for value in alphas.values())
    course = (run / "diagnostics.csv").read_text()
    assert course.count("pact_alpha,model.stage2.0.activation1.quantizer,") > 1
    assert "PACT" in (run / "report.html").read_text()


def test_weights_of_a_run_are_those_that_it_tested(fashion: Path, tmp_path: Path) -> None:
    asked = config(fashion, tmp_path / "run", "trainer.max_epochs=4")
    qtrain.fit(asked)
    callback = quantization(asked.method)
    assert callback is not None
    module = ImageClassifier(build_model(asked.model))
    callback.prepare(module)
    assert sum(isinstance(part, PactActivation) for part in module.modules()) == 7
    module.model.load_state_dict(load_file(tmp_path / "run" / "weights" / "model.safetensors"))
    checkpoint = torch.load(next((tmp_path / "run" / "checkpoints").glob("*.ckpt")), weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    with pytest.raises(RuntimeError, match="this checkpoint is quantized: add qtrain.callbacks.Quantization"):
        ImageClassifier(build_model(asked.model)).load_state_dict(checkpoint["state_dict"])


def test_from_given_weights_the_table_is_complete(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin, run = tmp_path / "twin", tmp_path / "run"
    full = qtrain.fit(config(fashion, twin, "method.name=none", "trainer.max_epochs=20"))
    assert full["recovery"] is None and not (twin / "weights" / "quantizers.json").exists()
    more = (f"model.weights={twin}", "method.weight.format=int2", "method.pact.format=int2", "optimizer.lr=0.01")
    assert main(["fit", "recipe=pact_fashion_mnist", *words(fashion, run, *more, "trainer.max_epochs=10")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "fit.json").read_text())
    recovery = found["recovery"]
    assert found["train_loss"] is not None
    assert recovery["full"] == pytest.approx(full["test_accuracy"])
    assert recovery["ptq"] < recovery["full"] and recovery["qat"] == found["test_accuracy"]
    for line in ("full precision", "PTQ (round to nearest)", "QAT", "share recovered"):
        assert line in shown
    logged = {key: float(rows(run, f"recovery/{key}")[0][1]) for key in recovery}
    assert logged == pytest.approx(recovery)
    assert "recovery" in json.dumps(found) and "share recovered" in (run / "report.html").read_text()


@pytest.mark.parametrize("cut", [2, 8])  # before quantization sets in, and after
def test_a_run_that_goes_on_ends_where_an_undisturbed_one_does(fashion: Path, tmp_path: Path, cut: int) -> None:
    more = ("run.save_every=2", "run.keep=9", "trainer.max_epochs=-1", "trainer.max_steps=10")
    more += ("method.start_step=6", "method.calibration_batches=2")
    straight = qtrain.fit(config(fashion, tmp_path / "one", *more))
    qtrain.fit(config(fashion, tmp_path / "two", *more))
    kept = tmp_path / "two" / "checkpoints" / f"step-{cut:06d}.ckpt"
    resumed = qtrain.fit(config(fashion, tmp_path / "two", *more, f"run.resume={kept}"))
    assert resumed["test_loss"] == straight["test_loss"]
    assert rows(tmp_path / "one", "train/loss") == rows(tmp_path / "two", "train/loss")
    one, two = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(CheckpointError, match="other"):
        qtrain.fit(config(fashion, tmp_path / "two", *more, f"run.resume={kept}", "method.weight.format=int3"))


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("method.skip=[nowhere]", ModelError, "skip pattern 'nowhere' matches no layer"),
        ("method.bits_schedule={0: int8, 5: int6}", ConfigError, "bits_schedule ends with weights in int6"),
        ("model.weights=HERE/other.safetensors", ModelError, "cannot be read"),
        ("model.weights=HERE/run", ModelError, "trained with quantizers"),
    ],
)
def test_mistakes_leave_an_earlier_run_alone(
    fashion: Path, tmp_path: Path, override: str, error: type[Exception], match: str
) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    run = tmp_path / "run"
    qtrain.fit(config(fashion, run, "trainer.max_steps=1"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match):
        qtrain.fit(config(fashion, run, "run.overwrite=true", override.replace("HERE", str(tmp_path))))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_weights_of_another_network_are_refused(fashion: Path, tmp_path: Path) -> None:
    qtrain.fit(config(fashion, tmp_path / "twin", "method.name=none", "trainer.max_steps=1"))
    wider = config(fashion, tmp_path / "run", f"model.weights={tmp_path / 'twin'}", "model.width=6")
    with pytest.raises(ModelError, match=r"there and .* here") as caught:
        qtrain.fit(wider)
    assert "model.width" in str(caught.value)


def test_weights_that_are_not_there_are_told_before_torch_is_loaded(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "task=vision", f"data.path={fashion}", f"model.weights={tmp_path}/none"]) == 2
    assert "no such run or file" in capsys.readouterr().err
