"""Recipes of quantization-aware training on a tiny Llama, through the command line: fit, measure, ask, export."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.quant_linear import QuantLinear
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import trained_subject

RECIPES = {
    "llm_qat_llama": [],
    "w2_llama": [],
    "qat_llama": ["method.weight.group_size=32"],  # the tiny model's rows are 64 wide
    "qat_lora_llama": ["method.weight.group_size=32", "method.lora.r=4"],
    "w8a8_llama": [],
}
Fit = Callable[[str], Path]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """Chats, held-out ones, and tokens that the tiny model wrote."""
    path = tmp_path_factory.mktemp("qat")
    for name, first in (("train", 0), ("held_out", 50)):
        rows = [
            {
                "prompt": f"What is the capital of country {n}?",
                "completion": f"City {n % 3}, and the dog {'on ' * (n % 4)}",
            }
            for n in range(first, first + 12)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.path={tiny_llama_dir}", "data.max_length=64", "generate_data.tokens=1024"]
    assert main(["generate-data", "recipe=llm_qat_llama", *words, f"generate_data.dir={path / 'tokens'}"]) == 0
    return path


@pytest.fixture(scope="module")
def fit(folder: Path, tiny_llama_dir: Path) -> Fit:
    """The finished run of a recipe, made when it is first asked for."""

    def call(recipe: str) -> Path:
        run = folder / recipe
        if not run.exists():
            own = load_recipe(recipe).data.train
            data = folder / ("tokens" if "tokens" in str(own) else "train.jsonl")
            words = [
                *(f"recipe={recipe}", f"run.dir={run}", f"model.path={tiny_llama_dir}", f"data.train={data}"),
                *(f"data.validation={folder / 'held_out.jsonl'}", "data.max_length=64", "data.batch_size=2"),
                *("trainer.max_steps=3", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu"),
                *("optimizer.lr=1e-3", "optimizer.warmup=0", "run.samples=[The dog]", "generate.max_new_tokens=4"),
            ]
            assert main(["fit", *words, *RECIPES[recipe]]) == 0
        return run

    return call


def test_these_are_all_recipes_of_language_models() -> None:
    folder = Path(__file__).parent.parent.parent / "recipes"
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    qat = {name for name, it in shipped.items() if it.get("method", {}).get("name") == "qat" and "task" not in it}
    assert qat == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fit_ends_with_the_table(fit: Fit, recipe: str) -> None:
    run = fit(recipe)
    figures = read(run / "fit.json")
    assert figures["steps"] == 3 and set(figures["recovery"]) == {"full", "ptq", "qat", "share"}
    assert {"config.yaml", "metrics.csv", "report.html", "weights", "checkpoints", "samples.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    assert "PTQ" in (run / "report.html").read_text()
    assert ("teacher" in figures["loss_path"]) == (recipe in ("llm_qat_llama", "w2_llama", "w8a8_llama"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_run_is_measured_and_asked(fit: Fit, recipe: str) -> None:
    run = fit(recipe)
    assert main(["validate", f"run.dir={run}"]) == 0
    assert read(run / "validate.json")["perplexity"] == pytest.approx(read(run / "fit.json")["val_perplexity_after"])
    assert main(["generate", f"run.dir={run}", "generate.prompt=The dog", "generate.max_new_tokens=4"]) == 0
    (answers,) = read(run / "generate.json")["answers"].values()
    assert 1 <= len(answers[0]["tokens"]) <= 4
    last = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert last["text"] == answers[0]["text"]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "w2_llama"])
def test_the_export_holds_the_codes_of_the_training(fit: Fit, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(recipe)
    capsys.readouterr()
    assert main(["export", f"run.dir={run}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found, directory = read(run / "export.json")["compressed-tensors"], run / "export" / "compressed-tensors"
    model = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run)).model
    records = dict(read_records(directory))
    assert len(records) == 14 == found["quantized_layers"]
    for name, record in records.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        codes, qparams = layer.codes()
        assert int((record.codes != codes).sum()) == 0 and torch.equal(record.scale, qparams.scale)
    assert f"{found['kl']:.2e}" in printed and "same top token" in printed
    assert found["scales"] == found["rounding"] == "as trained"
    # llm_qat_llama trains inputs by vLLM's convention, and transformers has the other one.
    assert found["kl"] < (1e-4 if recipe == "llm_qat_llama" else 1e-10)
    assert found["reference_perplexity"] == pytest.approx(read(run / "fit.json")["val_perplexity_after"], rel=1e-5)


def test_the_exports_logits_are_the_trained_models(fit: Fit) -> None:
    run = fit("w8a8_llama")
    assert main(["export", f"run.dir={run}", "export.evaluate=false"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(run / "export" / "compressed-tensors")
    trained = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run)).model
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_the_cache_is_a_note_for_who_serves(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("llm_qat_llama")
    assert main(["export", f"run.dir={run}", "export.evaluate=false"]) == 0
    flag = "vllm serve --kv-cache-dtype int4_per_token_head is the nearest"
    assert flag in capsys.readouterr().out
    assert any(flag in note for note in read(run / "export.json")["compressed-tensors"]["notes"])
    assert flag in (run / "export" / "compressed-tensors" / "README.md").read_text()


def test_levels_that_no_layout_packs_are_merged(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("w2_llama")
    assert main(["export", f"run.dir={run}"]) == 0
    found = read(run / "export.json")["merged"]
    assert found["base"] == "trained" and found["kl"] < 1e-10 and "alternative" not in found
    weights = AutoModelForCausalLM.from_pretrained(run / "export" / "merged").state_dict()
    groups = weights["model.layers.0.mlp.up_proj.weight"].reshape(-1, 32)
    assert max(len(group.unique()) for group in groups) <= 4
    assert main(["export", f"run.dir={run}", "export.format=compressed-tensors"]) == 2
    assert re.search(r"int2 half-integer.*method.weight.mid_rise=false", capsys.readouterr().err, re.DOTALL)


def test_what_cannot_be_exported_is_said_before_the_training(
    folder: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.path={tiny_llama_dir}", f"data.train={folder / 'train.jsonl'}", f"run.dir={folder / 'none'}"]
    assert main(["fit", *words, "method.name=qat", "method.weight.format=int5"]) == 2
    message = capsys.readouterr().err
    assert "export.format=merged" in message and "method.weight.format=int8" in message
    assert not (folder / "none").exists()


def test_an_export_into_another_base_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("qat_llama")
    assert main(["export", f"run.dir={run}", "export.format=merged", "export.base=original"]) == 2
    assert "merges an adapter, and method.name=qat has none" in capsys.readouterr().err
    assert main(["export", f"run.dir={run}", "export.format=adapter"]) == 2
    assert "method.name=qat has none" in capsys.readouterr().err
