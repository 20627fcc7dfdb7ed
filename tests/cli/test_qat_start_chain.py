"""Quantization-aware training from a starting point, through the command line: fit, measure, export, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.quant_linear import QuantLinear
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import trained_subject

OWN_EXTREMES = ["method.weight.range=dynamic", "method.weight.calibrate=min_max"]
RUNS = {
    "gptq": ["recipe=qat_llama", "method.weight.group_size=32", "method.gptq.damping=0.02"],
    "hqq": ["recipe=qat_llama", "method.weight.group_size=32", "method.weight.symmetric=false"],
    "smoothquant": ["recipe=w8a8_llama", "distill.loss=none"],
}
Fit = Callable[[str], Path]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> list[str]:
    path = tmp_path_factory.mktemp("start")
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [f"The capital of country {n} is city {n % 3}, and the dog runs." for n in range(first, first + 40)]
        (path / f"{name}.txt").write_text("\n".join(lines))
    return [
        *(f"model.path={tiny_llama_dir}", f"data.train={path / 'train.txt'}", "data.format=text"),
        *(f"data.validation={path / 'held_out.txt'}", "data.max_length=64", "data.batch_size=2"),
        *("trainer.max_steps=3", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu"),
        *("optimizer.lr=1e-4", "optimizer.warmup=0"),
    ]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Fit:
    folder = tmp_path_factory.mktemp("runs")

    def call(init: str) -> Path:
        run = folder / init
        if not run.exists():
            assert main(["fit", *RUNS[init], f"method.init={init}", *words, f"run.dir={run}"]) == 0
        return run

    return call


@pytest.mark.parametrize("init", RUNS)
def test_the_export_holds_the_codes_of_a_training_that_began_at_a_start(make: Fit, init: str) -> None:
    run = make(init)
    assert read(run / "fit.json")["init"] == init
    assert main(["validate", f"run.dir={run}"]) == 0
    assert read(run / "validate.json")["perplexity"] == pytest.approx(read(run / "fit.json")["val_perplexity_after"])
    assert main(["export", f"run.dir={run}"]) == 0
    found = read(run / "export.json")["compressed-tensors"]
    assert found["scales"] == found["rounding"] == "as trained" and found["kl"] < 1e-6
    model = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run)).model
    records = dict(read_records(run / "export" / "compressed-tensors"))
    assert len(records) == 14
    for name, record in records.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        codes, qparams = layer.codes()
        assert torch.equal(record.codes, codes) and torch.equal(record.scale, qparams.scale)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method.init=gtpq"], "did you mean 'gptq'?"),
        (["method.init=spqr"], "method.init='spqr'"),
        (["method.init=block_ap"], "method.name=peqa"),
        (["method.init=smoothquant"], "method.activation.format=int8"),
        (["method.init=gptq", *OWN_EXTREMES], "method.weight.range=learned"),
        (["method.init=gptq", "method.gptq.dampin=0.1"], "did you mean 'damping'?"),
        (["method.init=gptq", "method.lora.r=4"], "leave lora out"),
    ],
)
def test_mistakes_end_with_the_way_out(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], message: str
) -> None:
    assert main(["fit", "recipe=qat_llama", *words, f"run.dir={tmp_path / 'run'}", *keys]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_terminal_says_what_the_start_did(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["recipe=qat_llama", "method.init=awq", "method.weight.group_size=32", *OWN_EXTREMES]
    assert main(["fit", *keys, *words, f"run.dir={tmp_path / 'run'}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "start awq, 14 layers keep no ranges (method.weight.range=learned would)" in printed
    assert "PTQ (awq)" in printed
