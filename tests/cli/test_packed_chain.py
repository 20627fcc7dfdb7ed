"""Recipes over packed integers on a tiny Llama, through the command line: fit or quantize, go on, switch, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qtrain import peqa
from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.packed_identity import packed_layers
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import trained_subject

GROUPS = ["method.weight.group_size=32"]  # the tiny model's rows are 64 wide
BLOCKS = ["method.block_ap.rows=8", "method.block_ap.epochs=1", "method.block_ap.batch_size=4"]
TRAINED = {"peqa_llama": GROUPS, "peqa_llama_3bit": GROUPS, "efficientqat_llama_w2": [*GROUPS, *BLOCKS]}
QUANTIZED = {"ptq_gptq": GROUPS, "ptq_awq": GROUPS, "ptq_smoothquant": [], "ptq_hqq": GROUPS}
RECIPES = TRAINED | QUANTIZED
Make = Callable[[str], Path]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> list[str]:
    """What every call here says."""
    path = tmp_path_factory.mktemp("packed")
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [
            f"The capital of country {n} is city {n % 3}, and the dog runs {'on ' * (n % 4)}."
            for n in range(first, first + 60)
        ]
        (path / f"{name}.txt").write_text("\n".join(lines))
    return [
        *(
            f"model.path={tiny_llama_dir}",
            f"data.train={path / 'train.txt'}",
            f"data.validation={path / 'held_out.txt'}",
        ),
        *("data.format=text", "data.max_length=64", "data.batch_size=2"),
    ]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Make:
    """The finished run of a recipe, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def call(recipe: str) -> Path:
        run = folder / recipe
        if not run.exists():
            own = [*words, f"recipe={recipe}", f"run.dir={run}", *RECIPES[recipe]]
            if recipe in TRAINED:
                own += ["trainer.max_steps=4", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu"]
                own += ["optimizer.lr=1e-3", "optimizer.name=adamw", "run.save_every=2"]
            assert main(["fit" if recipe in TRAINED else "quantize", *own]) == 0
        return run

    return call


def test_these_are_all_recipes_over_packed_integers() -> None:
    folder = Path(__file__).parent.parent.parent / "recipes"
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert {name for name, it in shipped.items() if it.get("method", {}).get("name") in ("peqa", "ptq")} == set(RECIPES)


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_fit_leaves_a_packed_base_and_a_file_of_scales(make: Make, recipe: str) -> None:
    run = make(recipe)
    figures = read(run / "fit.json")
    assert figures["val_loss_after"] < figures["val_loss_before"]
    layers = packed_layers(peqa.load_base(run / "base"))
    assert len(layers) == 14
    assert figures["trained_parameters"] == sum(layer.scale.numel() for layer in layers.values())
    stored = load_file(run / "scales" / "scales.safetensors")
    assert stored.keys() == {f"{name}.scale" for name in layers}


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_a_quantization_leaves_a_packed_base_and_its_cost(make: Make, recipe: str) -> None:
    run = make(recipe)
    figures = read(run / "quantize.json")
    assert figures["perplexity_quantized"] == pytest.approx(figures["perplexity_full"], rel=0.05)
    assert figures["perplexity_quantized"] != figures["perplexity_full"]
    assert figures["bytes"] == (run / "base" / "model.safetensors").stat().st_size
    assert "PTQ" in (run / "report.html").read_text() or (run / "report.html").is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_export_holds_the_codes_and_scales_of_the_run(make: Make, recipe: str) -> None:
    run = make(recipe)
    assert main(["validate", f"run.dir={run}"]) == 0
    name, key = ("fit", "val_perplexity_after") if recipe in TRAINED else ("quantize", "perplexity_quantized")
    assert read(run / "validate.json")["perplexity"] == pytest.approx(read(run / f"{name}.json")[key], rel=1e-6)
    assert main(["export", f"run.dir={run}"]) == 0
    found = read(run / "export.json")["compressed-tensors"]
    assert found["top1"] == 1.0 and abs(found["kl"]) < 1e-6
    subject = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run))
    layers = packed_layers(subject.plain)
    records = dict(read_records(run / "export" / "compressed-tensors"))
    assert records.keys() == layers.keys()
    for name, record in records.items():
        own = layers[name].record()
        assert torch.equal(record.codes, own.codes) and torch.equal(record.dequantize(), own.dequantize())


def test_a_killed_run_goes_on_over_its_own_base(make: Make, words: list[str], tmp_path: Path) -> None:
    run = make("peqa_llama")
    keys = ["recipe=peqa_llama", *words, *GROUPS, "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu"]
    keys += ["optimizer.lr=1e-3", "optimizer.name=adamw", "run.save_every=2", f"run.dir={tmp_path / 'run'}"]
    # The schedule looks at the last step, so both have the same one.
    assert main(["fit", *keys, "trainer.max_steps=4"]) == 0
    for path in (tmp_path / "run" / "checkpoints").glob("step-000004*"):
        path.unlink()
    before = (tmp_path / "run" / "base" / "model.safetensors").read_bytes()
    assert main(["fit", *keys, "trainer.max_steps=4", "run.resume=true"]) == 0
    assert (tmp_path / "run" / "base" / "model.safetensors").read_bytes() == before
    one, other = (load_file(path / "scales" / "scales.safetensors") for path in (run, tmp_path / "run"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_tasks_switch_on_one_live_base(make: Make, words: list[str], tmp_path: Path) -> None:
    run = make("peqa_llama")
    model = peqa.load_base(run / "base")
    ids = torch.randint(0, 400, (1, 16), generator=torch.Generator().manual_seed(0))
    start = peqa.take_scales(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        peqa.switch(model, peqa.load_scales(run / "scales"))
        trained = model(input_ids=ids).logits
        peqa.switch(model, start)
        assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(trained, before)


def test_a_base_is_a_model_path(make: Make, words: list[str], tmp_path: Path) -> None:
    base = make("ptq_gptq") / "base"
    own = [word for word in words if not word.startswith("model.path")]
    keys = ["recipe=peqa_llama", *own, f"model.path={base}", "method.init=checkpoint", f"run.dir={tmp_path / 'run'}"]
    keys += ["trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu"]
    assert main(["fit", *keys, "optimizer.name=adamw"]) == 0
    one, other = (packed_layers(peqa.load_base(path)) for path in (base, tmp_path / "run" / "base"))
    assert all(torch.equal(one[name].weight, layer.weight) for name, layer in other.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method.init=gtpq"], "gptq"),
        (["method.weight.range=learned"], "method.init"),
        (["method.init=smoothquant"], "method.activation"),
        (["method.weight.format=fp8_e4m3"], "int4"),
        (["method.weight.format=int5"], "method.weight.format=int8"),
        (["method.init=checkpoint"], "16-bit weights"),
        (["method.skip=[nothing]"], "matches no layer"),
        (["method.head=true", "method.skip=[lm_heat]"], "lm_head"),
        (["method.name=ptq", "method.init=rtn"], "qtrain quantize"),
    ],
)
def test_mistakes_end_with_the_way_out(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], message: str
) -> None:
    assert main(["fit", "recipe=peqa_llama", *words, *GROUPS, f"run.dir={tmp_path / 'run'}", *keys]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_start_that_looks_at_text_wants_some(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = words
    assert main(["quantize", "recipe=ptq_gptq", path, "data.train=null"]) == 2
    assert "data.train" in capsys.readouterr().err


def test_quantized_weights_are_not_quantized_again(
    make: Make, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("ptq_gptq") / "base"
    assert main(["quantize", "recipe=ptq_hqq", f"model.path={base}", *GROUPS, f"run.dir={base.parent / 'again'}"]) == 2
    assert "method.init=checkpoint" in capsys.readouterr().err
