"""torchao's layout: codes and scales as trained, read back, and computed with by torchao where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtrain.errors import ExportError
from qtrain.export.torchao.config import TorchaoOptions
from qtrain.export.torchao.write import write
from qtrain.export.verify.count import Count
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.modules.quant_linear import QuantLinear

Build = Callable[..., PreTrainedModel]
LSQ = {"range": "learned", "calibrate": "mse"}
FP8 = {"format": "fp8_e4m3"}
CASES: dict[str, dict[str, Any]] = {
    "w4-groups": {"weight": {"format": "int4", "group_size": 32, **LSQ}},
    "w4-asymmetric": {"weight": {"format": "int4", "group_size": 32, "symmetric": False, **LSQ}},
    "w3-rows": {"weight": {"format": "int3", **LSQ}},
    "w8": {"weight": {"format": "int8"}},
    "w4-adapters": {"weight": {"format": "int4", "group_size": 32, **LSQ}, "lora": {"r": 4}},
    "w4a8": {
        "weight": {"format": "int4", "group_size": 32, **LSQ},
        "activation": {"format": "int8", "symmetric": False, "convention": "torchao"},
    },
    "w8a8": {
        "weight": {"format": "int8"},
        "activation": {"format": "int8", "convention": "torchao"},
        "kernels": "int8",
    },
    "fp8": {"weight": FP8},
    "fp8-tensors": {"weight": {**FP8, "granularity": "per_tensor"}},
    "fp8-inputs": {"weight": FP8, "activation": FP8},
    "fp8-fp16-scales": {"weight": {**FP8, "scale_dtype": "fp16"}},
    "mixed": {
        "weight": {"format": "int4", "group_size": 32},
        "rules": {"*.down_proj": {"weight": {"format": "int8", "granularity": "per_channel"}}},
        "skip": ["*.0.*.k_proj"],
    },
    "mixed-fp8": {
        "weight": FP8,
        "activation": FP8,
        "rules": {"*.v_proj": {"weight": {"format": "int8"}, "activation": None}},
        "skip": ["*.0.*.k_proj"],
    },
}


def where_torchao_is(test: Any) -> Any:
    """``test`` where torchao is; its kernels for other machines do not load, and it says so."""
    absent = importlib.util.find_spec("torchao") is None
    return pytest.mark.filterwarnings("ignore")(pytest.mark.skipif(absent, reason="torchao is not installed")(test))


def exported(
    name: str, model: PreTrainedModel, directory: Path, shard: str = "100KB", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    method = build_method(QatOptions.model_validate({"name": "qat", **CASES[name]}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    method.calibrate(model, [], nullcontext, lambda items, total: items)
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01 if "lora" in key else 1e-3)
    TorchaoOptions(evaluate=False).check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=dtype)
    write(deployed, TorchaoOptions(max_shard_size=shard), directory, tokenizer=None, facts={})
    model.eval()
    return model


def test_outliers_beside_the_codes_are_refused(
    tmp_path: Path,
    tiny_model: Build,
    qat_trained: Callable[..., Any],
    with_outliers: Callable[[Any], Any],
) -> None:
    method, model, _ = qat_trained(tiny_model(), {"weight": {"format": "int4"}})
    changed = with_outliers(method.deployed(model, dtype=torch.float32))
    with pytest.raises(ExportError, match=r"q_proj(.|\n)*1 of 4096 weights(.|\n)*SpQR(.|\n)*export\.format=merged"):
        write(changed, TorchaoOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_zero_points_are_those_of_the_training(tmp_path: Path, tiny_model: Build, name: str) -> None:
    model = exported(name, tiny_model(initializer_range=0.1), tmp_path / "out")
    layers = {key: module for key, module in model.named_modules() if isinstance(module, QuantLinear)}
    found = read_quantized(tmp_path / "out").records
    assert found.keys() == layers.keys() and len(found) == (13 if "mixed" in name else 14)
    for key, layer in layers.items():
        record, (codes, qparams) = found[key](), layer.codes()
        assert torch.equal(record.codes, codes) and torch.equal(record.scale, qparams.scale.float())
        assert torch.equal(record.dequantize(), layer.quantized_weight())
    if name == "w8a8":  # read back it multiplies levels, and the last bit of a sum decides the largest input's code
        return
    if "fp8" in name:  # no word holds them
        return
    ids = torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            load_packed(tmp_path / "out", torch.float32)(ids).logits, model(ids).logits, rtol=0, atol=2e-5
        )


def test_every_file_describes_its_tensors(tmp_path: Path, tiny_model: Build) -> None:
    model = exported("w4-groups", tiny_model(), tmp_path / "out", "30KB")
    every = {name for name, _ in model.named_parameters() if "quantizer" not in name}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        assert set(json.loads(metadata["tensor_names"])) == every
        whole = metadata.keys() - {"format", "tensor_names"}
        for name in whole:
            described = json.loads(metadata[name])
            parts = [f"{name.removesuffix('weight')}_weight_{part}" for part in described.get("_tensor_data_names", [])]
            assert all(part in names for part in parts or [name])
            assert described["_type"] == ("IntxUnpackedToInt8Tensor" if parts else "Tensor")
        assert len(names) == sum(3 if "mlp" in name or "self_attn" in name else 1 for name in whole)


@where_torchao_is
@pytest.mark.parametrize("name", CASES)
def test_torchao_computes_what_the_training_did(tmp_path: Path, tiny_model: Build, name: str) -> None:
    model = exported(name, tiny_model(initializer_range=0.1), tmp_path / "out")
    consumer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for key, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = consumer.get_submodule(key).weight
            assert type(weight).__name__ in ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor")
            assert torch.equal(weight.dequantize(), module.quantized_weight())
            x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = module(x)
                difference = (consumer.get_submodule(key)(x) - expected).abs()
            assert float(difference.max()) < 1e-5 * float(expected.std())
    ids = torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, consumer(ids).logits
    assert float(ours.std()) > 0.3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def loaded(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model


@where_torchao_is
@pytest.mark.parametrize("name", [name for name in CASES if "fp8" in name])
def test_fp8_is_written_as_torchao_writes_it(tmp_path: Path, tiny_model: Build, name: str) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    exported(name, tiny_model(), tmp_path / "out", "1GB")
    weights = {
        f"{key}.weight": module.weight
        for key, module in loaded(tmp_path / "out", torch.float32).named_modules()
        if type(getattr(module, "weight", None)).__name__ == "Float8Tensor"
    }
    assert len(weights) == (11 if "mixed" in name else 14)
    tensors, metadata = flatten_tensor_state_dict(weights)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for key, tensor in tensors.items():
            own = file.get_tensor(key)
            assert own.dtype == tensor.dtype and torch.equal(own.view(torch.uint8), tensor.view(torch.uint8))
        for key in weights:
            described = json.loads(file.metadata()[key], object_hook=without_version)
            assert described == json.loads(metadata[key]) and described["_tensor_data_names"] == ["qdata", "scale"]


def without_version(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "_version"}


@where_torchao_is
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_zeros_stay_zeros(tmp_path: Path, tiny_model: Build, dtype: torch.dtype) -> None:
    exported("fp8-inputs", tiny_model(), tmp_path / "out", dtype=dtype)
    layer = loaded(tmp_path / "out", dtype).get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    with torch.no_grad():
        y = layer(x)
    assert bool(y.isfinite().all()) and not bool(y[1].any()) and bool(y[[0, 2]].any())


@where_torchao_is
@pytest.mark.parametrize("name", ["fp8", "fp8-tensors", "fp8-inputs"])
def test_fp8_in_bf16_is_off_by_no_more_than_its_rounding(tmp_path: Path, tiny_model: Build, name: str) -> None:
    model = exported(name, tiny_model(initializer_range=0.1), tmp_path / "out", dtype=torch.bfloat16)
    consumer = loaded(tmp_path / "out", torch.bfloat16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for key, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.in_features == 64:
            layer = consumer.get_submodule(key)
            assert layer.weight.scale.dtype == torch.float32
            assert torch.equal(layer.weight.dequantize(), module.quantized_weight().bfloat16())
            with torch.no_grad():
                expected = module(x.float())
                difference = (layer(x).float() - expected).std() / expected.std()
            assert float(difference) < (0.02 if name == "fp8-inputs" else 0.005)


def test_verify_counts_bytes_of_fp8() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    other = codes.clone()
    other.view(torch.uint8)[0] = 128
    count = Count()
    count.add("a", codes.clone(), codes)
    assert not count.differing
    count.add("b", other, codes)
    assert count.differing == 1 and count.first == ("b", "at [0] -0 there, 0 in the run")


def test_what_cannot_be_run_is_known_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain.export.torchao.config.find_spec", lambda name: None)
    options = [QatOptions.model_validate({"name": "qat", "weight": weight}) for weight in (FP8, {})]
    trained = [list(each.trained_layers()) for each in options]
    with pytest.raises(ExportError, match="export.evaluate=false"):
        TorchaoOptions().check_trained(trained[0])
    TorchaoOptions(evaluate=False).check_trained(trained[0])
    TorchaoOptions().check_trained(trained[1])


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"weight": {"format": "int2", "mid_rise": True}}, "method.weight.mid_rise=false"),
        ({"weight": {"format": "fp8_e5m2"}}, "method.weight.format=fp8_e4m3"),
        ({"weight": {**FP8, "group_size": 32}}, "method.weight.granularity=per_channel"),
        ({"weight": {**FP8, "granularity": "per_tensor"}, "activation": FP8}, "method.weight.granularity=per_channel"),
        ({"weight": FP8, "activation": {"format": "int8"}}, "method.activation.format=fp8_e4m3"),
        ({"weight": FP8, "activation": {**FP8, "range": "static"}}, "method.activation.range=dynamic"),
        ({"weight": FP8, "activation": {**FP8, "scale_dtype": "bf16"}}, "method.activation.scale_dtype=fp32"),
        ({"weight": None, "activation": FP8}, "method.weight.format=fp8_e4m3"),
        ({"weight": {"format": "int4"}, "activation": {"format": "int8"}}, "method.activation.symmetric=false"),
        ({"weight": {"format": "int4"}, "activation": {"format": "int4"}}, "method.activation.format=int8"),
        ({"weight": None, "activation": {"format": "int8"}}, "method.weight.format=int8"),
    ],
)
def test_what_has_no_place_is_known_before_the_training(options: dict[str, Any], fix: str) -> None:
    section = QatOptions.model_validate({"name": "qat", **options})
    with pytest.raises(ExportError, match="export.format=merged") as caught:
        TorchaoOptions().check_trained(section.trained_layers())
    assert fix in str(caught.value)
