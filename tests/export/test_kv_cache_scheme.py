"""Static ranges of keys and values in an export: read by plain transformers, refused where there is no place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.write import write
from qtrain.export.consumers import load_export
from qtrain.export.locations import ExportLocation
from qtrain.export.merged.config import MergedOptions
from qtrain.export.merged.write import write as write_merged
from qtrain.export.verify.check import check_export
from qtrain.export.verify.verdict import Verdict
from qtrain.methods.qat.config import QatOptions
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.kv.prepare import kv_quantizers

Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
INT = {"range": "learned", "calibrate": "mse", "full_range": True, "scale_dtype": "bf16"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8": ({"group_size": 32}, {"format": "int8", **INT}),
    "int8-static": ({"group_size": 32}, {"format": "int8", **INT, "range": "static"}),
    "int4": ({}, {"format": "int4", **INT, "convention": "compressed-tensors", "full_range": False}),
    "int2": ({}, {"format": "int2", **INT}),
    "fp8": ({"group_size": 32}, {"format": "fp8_e4m3", "range": "static", "scale_dtype": "bf16"}),
}
SCALES = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"]


def options_of(name: str) -> dict[str, Any]:
    weight, cache = CASES[name]
    return {"weight": {"format": "int4", **weight}, "kv_cache": cache}


def exported(method: Any, model: PreTrainedModel, out: Path, tokenizer: Any = None) -> dict[str, Any]:
    deployed = method.deployed(model, dtype=torch.float32)
    return write(deployed, CompressedTensorsOptions(), out, tokenizer=tokenizer, facts={})


@pytest.fixture(scope="module")
def consumed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Build,
    qat_trained: Train,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """All cases exported, and read by one process that cannot import qtrain."""
    folder = tmp_path_factory.mktemp("cache")
    for name in CASES:
        method, model, _ = qat_trained(tiny_model(initializer_range=0.1), options_of(name))
        exported(method, model, folder / name, tiny_tokenizer)
    script = Path(__file__).with_name("consume.py")
    done = subprocess.run(
        [sys.executable, script, *(folder / name for name in CASES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_consumers_logits_are_those_of_the_training_graph(
    consumed: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    seen = load_file(consumed / f"{name}.seen")
    _, model, _ = qat_trained(tiny_model(initializer_range=0.1), options_of(name))
    with torch.no_grad():
        logits = model(seen["ids"]).logits
    torch.testing.assert_close(seen["logits"], logits, rtol=0, atol=2e-5)
    tokens = seen["ids"]
    for _ in range(seen["tokens"].shape[1] - tokens.shape[1]):  # the consumer's cache holds what training saw
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(seen["tokens"], tokens)
    # And it would be another model with the cache in full precision.
    for _, quantizer in kv_quantizers(model):
        quantizer.enabled = False
    with torch.no_grad():
        assert float((model(seen["ids"]).logits - seen["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_two_scales_and_the_header_says_what_they_are_of(
    consumed: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    _, model, _ = qat_trained(tiny_model(initializer_range=0.1), options_of(name))
    weights = load_file(consumed / name / "model.safetensors")
    assert sorted(key for key in weights if key.endswith(("k_scale", "v_scale"))) == SCALES
    for key, quantizer in kv_quantizers(model):
        scale = weights[key.replace("kv_quantizer.key", "k_scale").replace("kv_quantizer.value", "v_scale")]
        assert torch.equal(scale, quantizer.stored().scale.float().reshape(1))
        assert torch.equal(scale.bfloat16().float(), scale)
    scheme = json.loads((consumed / name / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    kind, bits = ("float", 8) if name == "fp8" else ("int", int(name[3]))
    assert scheme == {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }


@pytest.mark.parametrize(("name", "vllm"), [("int8", False), ("fp8", True)])
def test_the_card_says_who_reads_them(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str, vllm: bool
) -> None:
    method, model, _ = qat_trained(tiny_model(), options_of(name))
    result = exported(method, model, tmp_path / "out")
    assert result["vllm"] == vllm and len(result["notes"]) == 1
    assert "k_scale and v_scale are in this directory" in result["notes"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert result["notes"][0] in card and ("`vllm serve DIRECTORY`" in card) == vllm


@pytest.mark.parametrize(("size", "vllm"), [(None, True), (32, False)])
def test_int8_in_groups_beside_int8_inputs_is_none_of_vllms(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, size: int | None, vllm: bool
) -> None:
    options = {"weight": {"format": "int8", "group_size": size}, "activation": {"format": "int8"}}
    method, model, _ = qat_trained(tiny_model(), options)
    assert exported(method, model, tmp_path / "out")["vllm"] == vllm


def test_who_loads_it_here_adds_no_second_quantizer(tmp_path: Path, tiny_model: Build, qat_trained: Train) -> None:
    method, model, _ = qat_trained(tiny_model(), options_of("int8"))
    exported(method, model, tmp_path / "out")
    loaded = load_export("compressed-tensors", tmp_path / "out", torch.float32).model
    method.serve(model, loaded)
    assert list(kv_quantizers(loaded)) == []
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # what it says is what is wanted
def test_beside_zero_points_transformers_leaves_keys_and_values_alone(
    tmp_path: Path, tiny_model: Build, qat_trained: Train
) -> None:
    options = {"weight": {"format": "int4", "group_size": 32, "symmetric": False}, "kv_cache": CASES["int8"][1]}
    method, model, _ = qat_trained(tiny_model(), options)
    result = exported(method, model, tmp_path / "out")
    assert "it leaves keys and values alone" in result["notes"][1]
    loaded = load_export("compressed-tensors", tmp_path / "out", torch.float32).model
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, model(ids).logits)
        method.serve(model, loaded)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer codes": ({"format": "int8", **INT, "full_range": False}, "full_range=true"),
    "scales in fp32": ({"format": "int8", **INT, "scale_dtype": "fp32"}, "scale_dtype=bf16"),
    "zero points": ({"format": "int8", **INT, "symmetric": False, "full_range": False}, "symmetric=true"),
    "before RoPE": ({"format": "int8", **INT, "site": "pre_rope"}, "site=post_rope"),
    "half-integers": ({"format": "int2", **INT, "mid_rise": True}, "mid_rise=false"),
    "a window": ({"format": "int8", **INT, "residual": 8}, "residual=0"),
    "two formats": ({"format": "int8", **INT, "key": {"format": "int4"}}, "key={} method.kv_cache.value={}"),
    "fp8 of the other kind": ({"format": "fp8_e5m2", "range": "static", "scale_dtype": "bf16"}, "format=fp8_e4m3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_with_the_way_out(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    cache, fix = REFUSED[name]
    options = {"weight": {"format": "int4"}, "kv_cache": cache}
    # Before the training the config alone says so.
    section = QatOptions.model_validate({"name": "qat", **options}).trained_cache
    with pytest.raises(ExportError, match="no place for (learned|static) ranges of keys and values") as early:
        CompressedTensorsOptions().check_cache(section)
    assert f"method.kv_cache.{fix}" in str(early.value) and "method.kv_cache.range=dynamic" in str(early.value)
    method, model, _ = qat_trained(tiny_model(), options)
    with pytest.raises(ExportError) as late:
        exported(method, model, tmp_path / "out")
    assert str(late.value) == str(early.value) and list(tmp_path.iterdir()) == []
    # Where there is no place for any, the card says what is lost.
    MergedOptions().check_cache(section)
    result = write_merged(
        method.deployed(model, dtype=torch.float32), MergedOptions(), tmp_path / "out", tokenizer=None, facts={}
    )
    assert "nothing of them is in this directory" in result["notes"][0]


def test_ranges_of_their_own_need_no_place(tiny_model: Build, qat_trained: Train) -> None:
    method, model, _ = qat_trained(tiny_model(), {"weight": {"format": "int4"}, "kv_cache": {"format": "int4"}})
    CompressedTensorsOptions().check_cache(method.options.trained_cache)
    assert method.deployed(model, dtype=torch.float32).cache is None


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
LAST = SCALES[-1]
MUTANTS: dict[str, tuple[Change, str, str]] = {
    "scale": (lambda header, tensors: tensors[LAST].mul_(1.01), "scales", f"{LAST}: 1 of"),
    "keys for values": (
        lambda header, tensors: tensors.update({SCALES[2]: tensors[SCALES[3]], SCALES[3]: tensors[SCALES[2]]}),
        "scales",
        "2 of",
    ),
    "layers swapped": (
        lambda header, tensors: tensors.update({SCALES[0]: tensors[SCALES[2]], SCALES[2]: tensors[SCALES[0]]}),
        "scales",
        "2 of",
    ),
    "scale of another shape": (lambda header, tensors: tensors.update({LAST: torch.ones(2)}), "scales", "shape [2]"),
    "missing scale": (lambda header, tensors: tensors.pop(LAST), "names", f"{LAST}: it is missing"),
    "scale too many": (
        lambda header, tensors: tensors.update({"model.layers.2.self_attn.k_scale": torch.ones(1)}),
        "names",
        "model.layers.2.self_attn.k_scale: no tensor",
    ),
    "zero point": (
        lambda header, tensors: tensors.update({"model.layers.0.self_attn.k_zero_point": torch.ones(1)}),
        "names",
        "k_zero_point: no tensor",
    ),
    "no scheme": (lambda header, tensors: header.pop("kv_cache_scheme"), "layout", "kv_cache_scheme=None there"),
    "bits": (lambda header, tensors: header["kv_cache_scheme"].update(num_bits=4), "layout", "'num_bits': 4"),
    "dynamic": (lambda header, tensors: header["kv_cache_scheme"].update(dynamic=True), "layout", "'dynamic': True"),
    "float": (lambda header, tensors: header["kv_cache_scheme"].update(type="float"), "layout", "'type': 'float'"),
}


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Build,
    qat_trained: Train,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> tuple[Path, DeployedModel]:
    method, model, _ = qat_trained(tiny_model(initializer_range=0.1), options_of("int8"))
    out = tmp_path_factory.mktemp("good") / "out"
    exported(method, model, out, tiny_tokenizer)
    return out, method.deployed(model, dtype=torch.float32)


def verdict_of(directory: Path, deployed: DeployedModel) -> Verdict:
    return check_export(ExportLocation("compressed-tensors", directory, {}), deployed, None)


def test_a_good_export_passes_and_its_scales_are_counted(good: tuple[Path, DeployedModel]) -> None:
    verdict = verdict_of(*good)
    assert verdict.passed, [*map(str, verdict.failures)]
    groups = 2 * 2 * (2 * 64 + 2 * 32 + 2 * 128 + 2 * 64)  # of 32 weights
    assert verdict.figures["counts"]["scales"]["compared"] == groups + len(SCALES)
    assert verdict.cells["scales"] == "0"


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_and_named(good: tuple[Path, DeployedModel], tmp_path: Path, name: str) -> None:
    directory, deployed = good
    change, row, words = MUTANTS[name]
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change(config["quantization_config"], tensors)
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    verdict = verdict_of(tmp_path, deployed)
    assert not verdict.passed and verdict.cells[row] not in ("ok", "0", "-")
    assert any(words in str(failure) for failure in verdict.failures), [*map(str, verdict.failures)]


def test_scales_that_nobody_trained_are_found(
    good: tuple[Path, DeployedModel], tiny_model: Build, qat_trained: Train
) -> None:
    method, model, _ = qat_trained(tiny_model(initializer_range=0.1), {"weight": options_of("int8")["weight"]})
    verdict = verdict_of(good[0], method.deployed(model, dtype=torch.float32))
    assert verdict.cells["layout"] == verdict.cells["names"] == "FAILED"
    assert any("None in the run" in str(failure) for failure in verdict.failures)
