"""A model of packed layers as a directory: written, read back bit for bit, no larger than its codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qtrain.errors import ExportError, ModelError
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.integers.plan import plan_trained
from qtrain.methods.method import build_method
from qtrain.methods.ptq.config import PtqOptions
from qtrain.models.packed import load_packed, save_packed
from qtrain.modules.packed_identity import packed_identity, packed_layers
from qtrain.modules.packed_linear import PackedLinear

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "int4 rows": {"weight": {"format": "int4"}},
    "int3 groups, asymmetric": {"weight": {"format": "int3", "group_size": 32, "symmetric": False}},
    "int2, half-integer levels": {"weight": {"format": "int2", "group_size": 32, "mid_rise": True}},
    "int8 with int8 inputs": {"weight": {"format": "int8"}, "activation": {"format": "int8"}},
    "mixed": {
        "weight": {"format": "int4", "group_size": 32},
        "rules": {"*.down_proj": {"weight": {"format": "int8", "granularity": "per_channel"}}},
        "skip": ["*.k_proj"],
        "head": True,
    },
}


def quantized(model: LlamaForCausalLM, options: dict[str, Any]) -> LlamaForCausalLM:
    section = PtqOptions.model_validate({"name": "ptq", "init": "mse", **options})
    built = build_method(section).prepare(model, compute_dtype=torch.float32, device=CPU)
    assert isinstance(built, LlamaForCausalLM)
    return built


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_was_written(tmp_path: Path, tiny_llama: LlamaForCausalLM, name: str) -> None:
    model = quantized(tiny_llama, CASES[name])
    save_packed(model, tmp_path / "base")
    again = load_packed(tmp_path / "base", torch.float32)
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert packed_identity(again) == packed_identity(model)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    layers = packed_layers(again)
    assert layers.keys() == packed_layers(model).keys()
    assert ("lm_head" in layers) == (name == "mixed")


def test_the_file_is_as_large_as_its_codes_and_scales(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    weights = sum(layer.weight.numel() for layer in tiny_llama.model.layers.modules() if hasattr(layer, "in_features"))
    rest = sum(p.nbytes for p in tiny_llama.parameters()) - 4 * weights
    model = quantized(tiny_llama, {"weight": {"format": "int3", "group_size": 32}})
    save_packed(model, tmp_path / "base")
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "base" / "model.safetensors").values())
    assert stored == rest + weights * 3 // 8 + weights // 32 * 2


@pytest.mark.parametrize("init", ["rtn", "gptq", "smoothquant"])
def test_static_ranges_of_inputs_are_kept(tmp_path: Path, tiny_llama: LlamaForCausalLM, init: str) -> None:
    activation = {"format": "int8", "range": "static", "symmetric": False}
    section = PtqOptions.model_validate({"init": init, "weight": {"format": "int8"}, "activation": activation})
    method = build_method(section)
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    model = method.prepare(tiny_llama, compute_dtype=torch.float32, device=CPU, text=lambda rows: [ids])
    with pytest.raises(ModelError, match="has no range yet"):
        model(input_ids=ids)
    method.calibrate(model, [ids], torch.no_grad, lambda items, total: items)
    save_packed(method.plain_model(model), tmp_path / "base")
    again = load_packed(tmp_path / "base", torch.float32)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("damage", ["spec", "shape", "missing", "outlier"])
def test_damage_is_named(tmp_path: Path, tiny_llama: LlamaForCausalLM, damage: str) -> None:
    save_packed(quantized(tiny_llama, {"weight": {"format": "int4", "group_size": 32}}), tmp_path / "base")
    path, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    if damage == "spec":
        header = json.loads(config.read_text())
        header["quantization_config"]["layers"][0]["weight"]["format"] = "int40"
        config.write_text(json.dumps(header))
        expected = "int40"
    elif damage == "shape":
        tensors[f"{name}.scale"] = tensors[f"{name}.scale"][:, :1].contiguous()
        expected = f"{name}.scale of shape"
    elif damage == "missing":
        del tensors[f"{name}.weight"]
        expected = f"{name}.weight is missing"
    else:
        tensors[f"{name}.outlier_index"] = torch.tensor([5, 10**8], dtype=torch.int32)
        tensors[f"{name}.outlier_value"] = torch.zeros(2, dtype=torch.bfloat16)
        expected = "outlier_index reaches outside"
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=expected):
        load_packed(tmp_path / "base", torch.float32)


def test_zero_points_of_any_value_are_kept(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    model = quantized(tiny_llama, {"weight": {"format": "int4", "group_size": 32, "symmetric": False}})
    for layer in packed_layers(model).values():
        record = layer.record()
        assert record.zero_point is not None
        points = record.zero_point + torch.rand(record.zero_point.shape, generator=torch.Generator().manual_seed(0))
        layer.zero_point = PackedLinear.from_record(replace(record, zero_point=points)).zero_point
    save_packed(model, tmp_path / "base")
    again = load_packed(tmp_path / "base", torch.float32)
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    save_packed(again, tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    deployed = build_method(PtqOptions(name="ptq")).deployed(again, dtype=torch.float32)
    with pytest.raises(ExportError, match=r"14 layers are no whole numbers(.|\n)*q_proj(.|\n)*export\.format=merged"):
        plan_trained(list(deployed.tensors()), CompressedTensorsOptions())
