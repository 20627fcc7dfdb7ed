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
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.models.packed import load_packed
from qtrain.models.quantized.checkpoint import read_quantized
from qtrain.modules.quant_linear import QuantLinear

Build = Callable[..., PreTrainedModel]
LSQ = {"range": "learned", "calibrate": "mse"}
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
    "mixed": {
        "weight": {"format": "int4", "group_size": 32},
        "rules": {"*.down_proj": {"weight": {"format": "int8", "granularity": "per_channel"}}},
        "skip": ["*.0.*.k_proj"],
    },
}


def exported(name: str, model: PreTrainedModel, directory: Path, shard: str = "100KB") -> PreTrainedModel:
    method = build_method(QatOptions.model_validate({"name": "qat", **CASES[name]}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    method.calibrate(model, [], nullcontext, lambda items, total: items)
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01 if "lora" in key else 1e-3)
    TorchaoOptions().check_trained(method.options.trained_layers())
    deployed = method.deployed(model, dtype=torch.float32)
    write(deployed, TorchaoOptions(max_shard_size=shard), directory, tokenizer=None, facts={})
    model.eval()
    return model


@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_zero_points_are_those_of_the_training(tmp_path: Path, tiny_model: Build, name: str) -> None:
    model = exported(name, tiny_model(initializer_range=0.1), tmp_path / "out")
    layers = {key: module for key, module in model.named_modules() if isinstance(module, QuantLinear)}
    found = read_quantized(tmp_path / "out").records
    assert found.keys() == layers.keys() and len(found) == (13 if name == "mixed" else 14)
    for key, layer in layers.items():
        record, (codes, qparams) = found[key](), layer.codes()
        assert torch.equal(record.codes, codes) and torch.equal(record.scale, qparams.scale.float())
        assert torch.equal(record.dequantize(), layer.quantized_weight())
    if name == "w8a8":  # read back it multiplies levels, and the last bit of a sum decides the largest input's code
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


# torchao's kernels for other machines do not load, and it says so.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("name", CASES)
def test_torchao_computes_what_the_training_did(tmp_path: Path, tiny_model: Build, name: str) -> None:
    model = exported(name, tiny_model(initializer_range=0.1), tmp_path / "out")
    consumer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for key, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = consumer.get_submodule(key).weight
            assert type(weight).__name__ in ("IntxUnpackedToInt8Tensor", "Int8Tensor")
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


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"weight": {"format": "int2", "mid_rise": True}}, "method.weight.mid_rise=false"),
        ({"weight": {"format": "fp8_e4m3"}}, "method.weight.format=int8"),
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
