"""Codes of a training, and of a merged adapter, through the command line into gptq and awq."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtrain.cli import main

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # GPTQModel's, where it is installed.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("gptq")
    text = [f"Country {n} has {n % 3} cities, and the dog runs {'on ' * (n % 4)}." for n in range(80)]
    (folder / "train.txt").write_text("\n".join(text[:60]))
    (folder / "held_out.txt").write_text("\n".join(text[60:]))

    def call(name: str, *words: str) -> Path:
        data = [f"data.train={folder / 'train.txt'}", f"data.validation={folder / 'held_out.txt'}", "data.format=text"]
        sizes = ["data.max_length=64", "data.batch_size=2", "trainer.max_steps=3", "trainer.accelerator=cpu"]
        rate = ["optimizer.lr=1e-3", "trainer.accumulate_grad_batches=1"]
        run = folder / name
        assert main(["fit", f"run.dir={run}", f"model.path={tiny_llama_dir}", *data, *sizes, *rate, *words]) == 0
        return run

    return call


def exported(run: Path, name: str, *words: str) -> dict[str, Any]:
    assert main(["export", f"run.dir={run}", f"export.format={name}", *words]) == 0
    found: dict[str, Any] = json.loads((run / "export.json").read_text(encoding="utf-8"))[name]
    return found


def test_codes_under_an_adapter_are_exported_as_they_trained(fit: Callable[..., Path]) -> None:
    """fq(W + BA): nothing is merged into codes afterwards, so nothing is lost."""
    lora = ["method.lora.r=4", "method.weight.format=int4", "method.weight.group_size=32"]
    run = fit("adapted", "recipe=qat_llama", *lora, "method.activation=null", "method.kv_cache=null")
    for name in ("gptq", "awq"):
        found = exported(run, name)
        assert found["verified"]["passed"]
        assert found["verified"]["counts"]["codes"] == {"compared": 73728, "differing": 0}
        assert found["verified"]["counts"]["scales"]["differing"] == 0
        assert abs(found["kl"]) < 1e-4 and found["top1"] > 0.99
        assert found["measured_in"] in ("qtrain", "transformers with GPTQModel")
        if found["measured_in"] == "qtrain":
            assert "pip install gptqmodel" in found["notes"][-1]
            assert found["candidate_perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-6)
            assert "qtrain's own reader" not in (run / "export" / name / "README.md").read_text()
    assert main(["verify", f"run.dir={run}"]) == 0


def test_a_merged_adapter_gets_codes(fit: Callable[..., Path]) -> None:
    run = fit("merged", "recipe=lora_llama")
    four = exported(run, "gptq", "export.symmetric=false", "export.calibration_rows=4")
    assert four["layout"] == "gptq_v2" and four["rounding"] == "gptq" and four["calibration_tokens"] > 0
    eight = exported(run, "gptq", "export.bits=8", "export.calibration_rows=4")
    assert eight["layout"] == "gptq" and abs(eight["kl"]) < abs(four["kl"]) < 0.1
    assert exported(run, "awq", "export.rounding=nearest", "export.calibration_rows=0")["rounding"] == "nearest"


def test_what_gptq_cannot_hold_is_said_before_the_training(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = [f"model.path={tiny_llama_dir}", f"data.train={tmp_path / 'a.txt'}", f"run.dir={tmp_path / 'run'}"]
    inputs = ["method.weight.format=int8", "method.activation.format=int8"]
    assert main(["fit", "recipe=qat_llama", *words, *inputs, "export.format=gptq"]) == 2
    message = capsys.readouterr().err
    assert "inputs stay in 16 bits" in message and "export.format=compressed-tensors" in message
    assert not (tmp_path / "run").exists()
