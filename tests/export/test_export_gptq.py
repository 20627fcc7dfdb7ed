"""GPTQ directories of our own: codes as trained or chosen, read back, and unpacked by numpy alone."""

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
from qtrain.export.gptq.config import GptqOptions
from qtrain.export.gptq.layer import gptq_tensors
from qtrain.export.gptq.write import write
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.activation_stats import Calibration

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]
Train = Callable[..., Any]
LSQ = {"range": "learned", "calibrate": "mse"}
NO_VLLM = "vLLM runs GPTQ codes that are symmetric"
CASES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "w4-rows": ({"weight": {"format": "int4", **LSQ}}, "gptq", None),
    "w4-groups": ({"weight": {"format": "int4", "group_size": 32, **LSQ}}, "gptq", None),
    "w4-whole-range": ({"weight": {"format": "int4", "group_size": 64, "full_range": True}}, "gptq", None),
    "w4-asymmetric": ({"weight": {"format": "int4", "group_size": 32, "symmetric": False, **LSQ}}, "gptq_v2", NO_VLLM),
    "w4-adapters": ({"weight": {"format": "int4", "group_size": 32, **LSQ}, "lora": {"r": 4}}, "gptq", None),
    "w3": ({"weight": {"format": "int3", "group_size": 32, **LSQ}}, "gptq", NO_VLLM),
    "w3-asymmetric-rows": ({"weight": {"format": "int3", "symmetric": False}}, "gptq_v2", NO_VLLM),
    "w2": ({"weight": {"format": "int2", "group_size": 16}}, "gptq", NO_VLLM),
    "w2-asymmetric": ({"weight": {"format": "int2", "group_size": 32, "symmetric": False}}, "gptq_v2", NO_VLLM),
    "w8": ({"weight": {"format": "int8"}}, "gptq", None),
    "w8-asymmetric": ({"weight": {"format": "int8", "group_size": 64, "symmetric": False}}, "gptq_v2", NO_VLLM),
    "mixed": (
        {
            "weight": {"format": "int4", "group_size": 32},
            "rules": {"*.down_proj": {"weight": {"format": "int8", "granularity": "per_channel"}}},
            "skip": ["*.0.*.k_proj"],
        },
        "gptq",
        "under `dynamic`",
    ),
}


def numbers(words: Tensor, bits: int) -> np.ndarray:
    """Unsigned numbers of words int32 [rows, n], a stream of bits a row, lowest first."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(stream), -1, bits).astype(np.int64)
    found: np.ndarray = (stream << np.arange(bits)).sum(axis=-1)
    return found


def weight_of(tensors: dict[str, Tensor], bits: int, version: int) -> np.ndarray:
    """w = (u - z) s by the papers' layout, in fp64."""
    k, n = len(tensors["g_idx"]), tensors["scales"].shape[1]
    u = numbers(tensors["qweight"].t(), bits)[:, :k]
    z = numbers(tensors["qzeros"], bits)[:, :n] + (1 if version == 1 else 0)
    group = tensors["g_idx"].numpy()
    found: np.ndarray = (u - z.T[:, group]) * tensors["scales"].double().numpy().T[:, group]
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_code_and_no_scale_is_another_one(tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str) -> None:
    options, layout, note = CASES[name]
    method, model, layers = qat_trained(tiny_model(initializer_range=0.1), options)
    GptqOptions().check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=torch.float32)
    result = write(deployed, GptqOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert result["layout"] == layout and result["scales"] == "as trained"
    assert [note in its for its in result["notes"]] == ([] if note is None else [True])
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve" in card) == (note != NO_VLLM) and "# needs: pip install gptqmodel optimum" in card
    records = read_quantized(tmp_path / "out").records
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert records.keys() == layers.keys() and len(records) == (13 if name == "mixed" else 14)
    for layer, load in records.items():
        record, own = load(), layers[layer]
        codes, qparams = own.codes()
        assert int((record.codes != codes).sum()) == 0
        assert torch.equal(record.scale.float(), qparams.scale.float())
        assert torch.equal(record.dequantize(), own.quantized_weight())
        tensors = {part: stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert tensors["scales"].dtype == torch.float16
        judged = weight_of(tensors, record.spec.bits, 1 if layout == "gptq" else 2)
        assert np.array_equal(judged, own.quantized_weight().detach().double().numpy())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "out", torch.float32)(ids).logits, model(ids).logits)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    full_range=st.booleans(),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_unpacked_to_the_same_weight(
    bits: int, rows: int, groups: int, size: int, symmetric: bool, full_range: bool, version: int, seed: int
) -> None:
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(
        f"int{bits}", symmetric, "per_group", size, full_range=full_range and symmetric, scale_dtype="bf16"
    )
    qparams = choose_qparams(weight, spec)
    record = LinearRecord(quantize(weight, qparams, spec), *qparams, spec)
    if version == 1 and qparams.zero_point is not None and int(qparams.zero_point.min()) == spec.quant_min:
        with pytest.raises(ExportError, match="zero points of 0"):
            gptq_tensors("layer", record, 1)
        return
    tensors = gptq_tensors("layer", record, version)
    assert list(tensors["qweight"].shape) == [groups * size * bits // 32, rows]
    assert list(tensors["qzeros"].shape) == [groups, -(-rows * bits // 32)]
    assert np.array_equal(weight_of(tensors, bits, version), record.dequantize().double().numpy())


def test_symmetric_zero_points_are_sevens_in_v1_and_eights_in_v2() -> None:
    weight = torch.randn(12, 64)
    spec = QuantSpec("int4", group_size=32, scale_dtype="bf16")
    qparams = choose_qparams(weight, spec)
    record = LinearRecord(quantize(weight, qparams, spec), *qparams, spec)
    # Twelve outputs: the last four fields of the second word are padding.
    for version, whole, half in ((1, 0x77777777, 0x7777), (2, 0x88888888, 0x8888)):
        words = gptq_tensors("layer", record, version)["qzeros"].numpy().view(np.uint32)
        assert words.tolist() == [[whole, half]] * 2


def test_the_directory_is_whole(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    out = tmp_path / "out"
    options = GptqOptions(ignore=["model.layers.0.mlp.up_proj"], layout="v2", max_shard_size="60KB")
    result = write(deploy(tiny_model()), options, out, tokenizer=tiny_tokenizer, facts={})
    header = json.loads((out / "config.json").read_text())["quantization_config"]
    assert header == json.loads((out / "quantize_config.json").read_text())
    (kept,) = (header.pop("modules_in_block_to_quantize"),)
    assert header == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {r"-:^model\.layers\.0\.mlp\.up_proj$": {}},
    }
    assert list(kept[0]) == list(read_quantized(out).records) and len(kept[0]) == result["quantized_layers"] == 13
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight" in index["weight_map"] and len(set(index["weight_map"].values())) > 2
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert "in the gptq layout `gptq_v2`" in (out / "README.md").read_text()


def calibration_of(model: PreTrainedModel) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(model, [torch.randint(4, 500, (2, 64), generator=generator) for _ in range(3)])


@pytest.mark.parametrize("keys", [{}, {"bits": 8, "group_size": -1}, {"bits": 3, "symmetric": False}, {"bits": 2}])
def test_merged_models_get_codes(tmp_path: Path, tiny_model: Build, deploy: Deploy, keys: dict[str, Any]) -> None:
    model = tiny_model()
    result = write(
        deploy(model),
        GptqOptions(**keys),
        tmp_path / "out",
        tokenizer=None,
        facts={},
        calibration=calibration_of(model),
    )
    assert result["rounding"] == "gptq" and result["calibration_tokens"] == 384
    for name, load in read_quantized(tmp_path / "out").records.items():
        weight, record = model.get_parameter(f"{name}.weight").detach(), load()
        assert record.spec.bits == keys.get("bits", 4) and record.spec.symmetric == keys.get("symmetric", True)
        error = (record.dequantize() - weight).norm() / weight.norm()
        assert error < {8: 0.01, 4: 0.15, 3: 0.25, 2: 0.6}[record.spec.bits]


def test_all_layers_share_the_group_size_that_divides_each(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model(hidden_size=96, intermediate_size=256, head_dim=24)
    result = write(deploy(model), GptqOptions(group_size=128), tmp_path / "out", tokenizer=None, facts={})
    assert result["group_sizes"] == {"32": 14}
    assert result["fallbacks"] == [{"in_features": 96, "asked": 128, "used": 32, "layers": 14}]
    assert result["notes"][0] == "group_size=128 does not divide 96 inputs: 14 layers have groups of 32"
    assert "dynamic" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


INT8 = {"format": "int8", "convention": "compressed-tensors"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "int5": ({"weight": {"format": "int5"}}, "int5 symmetric", "export.format=merged, which keeps"),
    "int8 for int5": ({"weight": {"format": "int5"}}, "int5 symmetric", "method.weight.format=int8"),
    "mid_rise": ({"weight": {"format": "int2", "mid_rise": True}}, "half-integer", "method.weight.mid_rise=false"),
    "ternary": ({"weight": {"format": "ternary"}}, "ternary symmetric", "method.weight.format=int2"),
    "fp8": ({"weight": {"format": "fp8_e4m3"}}, "fp8_e4m3", "method.weight.format=int8"),
    "inputs": (
        {"weight": {"format": "int8"}, "activation": INT8},
        "int8 symmetric per_token inputs",
        "compressed-tens",
    ),
    "groups": ({"weight": {"group_size": 8}}, "per_group(8)", "method.weight.group_size=16"),
    "per_tensor": ({"weight": {"granularity": "per_tensor"}}, "per_tensor", "method.weight.granularity=per_channel"),
    "scales": ({"weight": {"scale_dtype": "fp32"}}, "int4 symmetric", "method.weight.scale_dtype=bf16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_the_training_and_after(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    options, what, fix = REFUSED[name]
    method, model, _ = qat_trained(tiny_model(), options)
    with pytest.raises(ExportError) as early:
        GptqOptions().check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=torch.float32)
    with pytest.raises(ExportError) as late:
        write(deployed, GptqOptions(), tmp_path / "out", tokenizer=None, facts={})
    for error in (early, late):
        assert what in str(error.value) and fix in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_zero_points_are_no_matter_of_v1(tmp_path: Path, tiny_model: Build, qat_trained: Train) -> None:
    method, model, _ = qat_trained(tiny_model(), {"weight": {"format": "int4", "symmetric": False}})
    deployed = method.deployed(model, dtype=torch.float32)
    with pytest.raises(ExportError, match=r"layout=v1(.|\n)*export\.layout=v2"):
        write(deployed, GptqOptions(layout="v1"), tmp_path / "out", tokenizer=None, facts={})


def test_outputs_that_fill_no_word_pad_the_zero_points(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model(num_key_value_heads=1, head_dim=20)
    write(deploy(model), GptqOptions(group_size=-1), tmp_path / "out", tokenizer=None, facts={})
    name = "model.layers.0.self_attn.k_proj"
    assert list(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.qzeros"].shape) == [1, 3]
    assert list(read_quantized(tmp_path / "out").records[name]().codes.shape) == [20, 64]


@pytest.mark.parametrize(
    ("bits", "shape", "name"),
    [(4, {"intermediate_size": 20}, "mlp.down_proj"), (3, {"num_key_value_heads": 1, "head_dim": 32}, None)]
    + [(3, {"num_key_value_heads": 1, "head_dim": 24}, "self_attn.k_proj")],
)
def test_words_are_whole(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, bits: Any, shape: dict[str, int], name: str | None
) -> None:
    options, model = GptqOptions(bits=bits, group_size=-1), deploy(tiny_model(**shape))
    if name is None:
        write(model, options, tmp_path / "out", tokenizer=None, facts={})
        return
    with pytest.raises(ExportError, match=rf"words are whole(.|\n)*export\.ignore=\[model\.layers\.0\.{name}\]"):
        write(model, options, tmp_path / "out", tokenizer=None, facts={})


def test_scales_that_fp16_does_not_hold_are_named() -> None:
    spec = QuantSpec("int4", group_size=32, scale_dtype="bf16")
    scale = torch.full((4, 2), 0.5, dtype=torch.bfloat16)
    scale[2, 1] = 2.0**-20 * 1.0078125  # 8 bits of mantissa, where fp16 has 4 left
    record = LinearRecord(torch.zeros(4, 64, dtype=torch.int8), scale, None, spec)
    with pytest.raises(ExportError, match=r"up_proj: 1 of 8 scales(.|\n)*row 2, group 1(.|\n)*compressed-tensors"):
        gptq_tensors("up_proj", record, 1)


def test_outliers_beside_the_codes_are_refused(
    tmp_path: Path,
    tiny_model: Build,
    qat_trained: Callable[..., Any],
    with_outliers: Callable[[Any], Any],
) -> None:
    method, model, _ = qat_trained(tiny_model(), {"weight": {"format": "int4"}})
    changed = with_outliers(method.deployed(model, dtype=torch.float32))
    with pytest.raises(ExportError, match=r"q_proj(.|\n)*1 of 4096 weights(.|\n)*SpQR(.|\n)*export\.format=merged"):
        write(changed, GptqOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "keys", [{"bits": 5}, {"group_size": 48}, {"layout": "v3"}, {"layout": "v1", "symmetric": False}, {"sym": True}]
)
def test_options_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GptqOptions(**keys)
