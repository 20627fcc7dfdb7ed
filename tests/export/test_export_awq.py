"""AWQ directories of our own: codes as trained or chosen, read back, and unpacked by numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError
from qtrain.export.awq.config import AwqOptions
from qtrain.export.awq.layer import awq_tensors
from qtrain.export.awq.write import write
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]
Train = Callable[..., Any]
LSQ = {"range": "learned", "calibrate": "mse"}
CASES: dict[str, dict[str, Any]] = {
    "rows": {"weight": {"format": "int4", "symmetric": False}},
    "groups": {"weight": {"format": "int4", "group_size": 32, "symmetric": False, **LSQ}},
    "groups-64": {"weight": {"format": "int4", "group_size": 64, "symmetric": False}, "skip": ["*.0.*.k_proj"]},
    "symmetric": {"weight": {"format": "int4", "group_size": 32, **LSQ}},
    "whole-range": {"weight": {"format": "int4", "group_size": 32, "full_range": True}},
    "adapters": {"weight": {"format": "int4", "group_size": 32, "symmetric": False, **LSQ}, "lora": {"r": 4}},
}
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def nibbles(words: Tensor) -> np.ndarray:
    """Unsigned [rows, out] of words [rows, out / 8]: nibble i is column ORDER[i] of its eight."""
    unsigned = words.numpy().view(np.uint32)
    found = np.zeros((len(unsigned), unsigned.shape[1], 8), dtype=np.int64)
    for i, column in enumerate(ORDER):
        found[..., column] = (unsigned >> (4 * i)) & 15
    return found.reshape(len(unsigned), -1)


def weight_of(tensors: dict[str, Tensor]) -> np.ndarray:
    """w = (u - z) s [out, in], in fp64."""
    u, z, scale = nibbles(tensors["qweight"]), nibbles(tensors["qzeros"]), tensors["scales"].double().numpy()
    size = len(u) // len(z)
    found: np.ndarray = ((u - z.repeat(size, 0)) * scale.repeat(size, 0)).T
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_code_and_no_scale_is_another_one(tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str) -> None:
    method, model, layers = qat_trained(tiny_model(initializer_range=0.1), CASES[name])
    AwqOptions().check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=torch.float32)
    result = write(deployed, AwqOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert result["layout"] == "gemm" and result["scales"] == "as trained"
    records = read_quantized(tmp_path / "out").records
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert records.keys() == layers.keys() and len(records) == (13 if "skip" in CASES[name] else 14)
    for layer, load in records.items():
        record, own = load(), layers[layer]
        codes, qparams = own.codes()
        assert int((record.codes != codes).sum()) == 0
        assert torch.equal(record.scale.float(), qparams.scale.float())
        assert torch.equal(record.dequantize(), own.quantized_weight())
        assert record.zero_point is not None
        assert qparams.zero_point is not None or not record.zero_point.any()
        tensors = {part: stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")}
        assert tensors["scales"].dtype == torch.float16
        assert np.array_equal(weight_of(tensors), own.quantized_weight().detach().double().numpy())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "out", torch.float32)(ids).logits, model(ids).logits)


@settings(max_examples=40, deadline=None)
@given(
    eights=st.integers(1, 9),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_is_unpacked_to_the_same_weight(
    eights: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = torch.randn(8 * eights, groups * size, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec("int4", symmetric, "per_group", size, full_range=symmetric, scale_dtype="bf16")
    qparams = choose_qparams(weight, spec)
    record = LinearRecord(quantize(weight, qparams, spec), *qparams, spec)
    tensors = awq_tensors("layer", record)
    assert list(tensors["qweight"].shape) == [groups * size, eights]
    assert list(tensors["qzeros"].shape) == [groups, eights]
    assert np.array_equal(weight_of(tensors), record.dequantize().double().numpy())
    if symmetric:
        assert set(tensors["qzeros"].numpy().view(np.uint32).ravel().tolist()) == {0x88888888}


def test_the_directory_is_whole(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A merged model: 16 and 48 divide its widths, and no kernel has such groups."""
    out = tmp_path / "out"
    model = tiny_model(hidden_size=96, intermediate_size=240, head_dim=24)
    options = AwqOptions(group_size=64, ignore=["re:.*layers\\.1\\.mlp\\.gate_proj"], max_shard_size="60KB")
    result = write(deploy(model), options, out, tokenizer=tiny_tokenizer, facts={})
    assert result["group_sizes"] == {"row": 13}
    assert [gap["in_features"] for gap in result["fallbacks"]] == [96, 240]
    header = json.loads((out / "config.json").read_text())["quantization_config"]
    assert header == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate_proj"],
    }
    records = read_quantized(out).records
    assert len(records) == 13
    for name, load in records.items():
        weight, record = model.get_parameter(f"{name}.weight").detach(), load()
        assert record.zero_point is not None and bool(record.zero_point.any())
        assert (record.dequantize() - weight).norm() / weight.norm() < 0.15
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert "int4 with zero points" in (out / "README.md").read_text()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "int8": ({"weight": {"format": "int8"}}, "int8 symmetric", "export.format=compressed-tensors"),
    "int3": ({"weight": {"format": "int3", "group_size": 32}}, "int3 symmetric", "method.weight.format=int4"),
    "groups": ({"weight": {"group_size": 16}}, "per_group(16)", "method.weight.group_size=32"),
    "ternary": ({"weight": {"format": "ternary"}}, "ternary", "export.format=merged"),
    "inputs": (
        {"weight": {"format": "int4"}, "activation": {"format": "int8"}},
        "int8 symmetric per_token inputs",
        "method.activation=null",
    ),
    "sizes": (
        {"weight": {"group_size": 32}, "rules": {"*.down_proj": {"weight": {"group_size": 64}}}},
        "per_group(64)",
        "export.format=compressed-tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_the_training_and_after(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    options, what, fix = REFUSED[name]
    method, model, _ = qat_trained(tiny_model(), options)
    with pytest.raises(ExportError) as early:
        AwqOptions().check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=torch.float32)
    with pytest.raises(ExportError) as late:
        write(deployed, AwqOptions(), tmp_path / "out", tokenizer=None, facts={})
    for error in (early, late):
        assert what in str(error.value) and fix in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_eight_outputs_share_a_word(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model(num_key_value_heads=1, head_dim=20)
    with pytest.raises(ExportError, match=r"k_proj(.|\n)*multiple of 8(.|\n)*export\.ignore=\[model\.layers\.0"):
        write(deploy(model), AwqOptions(), tmp_path / "out", tokenizer=None, facts={})


@pytest.mark.parametrize("keys", [{"bits": 8}, {"group_size": 16}, {"layout": "v2"}, {"zero_point": True}])
def test_options_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AwqOptions(**keys)
