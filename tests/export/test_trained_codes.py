"""Codes of the training in an export: read back, and computed with by plain transformers without qtrain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.errors import ExportError, ModelError
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.write import write
from qtrain.export.merged.config import MergedOptions
from qtrain.export.merged.write import write as write_merged
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.models.quantized.checkpoint import read_records
from qtrain.modules.quant_linear import QuantLinear

Build = Callable[..., PreTrainedModel]
LSQ = {"range": "learned", "calibrate": "mse"}
INT8 = {"format": "int8", "convention": "compressed-tensors"}
PACKED: dict[str, dict[str, Any]] = {
    "w4-rows": {"weight": {"format": "int4", **LSQ}},
    "w4-groups": {"weight": {"format": "int4", "group_size": 32, **LSQ}},
    "w4-adapters": {"weight": {"format": "int4", "group_size": 32, **LSQ}, "lora": {"r": 4}},
    "w4-tied": {"weight": {"format": "int4", "group_size": 32}, "embedding": {"format": "int8"}, "head": False},
    "w8": {"weight": {"format": "int8"}},
    "w2": {"weight": {"format": "int2", "group_size": 32, **LSQ}},
    "w3": {"weight": {"format": "int3", "group_size": 32, **LSQ}},
    "w3-asymmetric": {"weight": {"format": "int3", "group_size": 32, "symmetric": False, **LSQ}},
    "w4-asymmetric-rows": {"weight": {"format": "int4", "symmetric": False}},
    "mixed": {
        "weight": {"format": "int4", "group_size": 32},
        "rules": {"*.down_proj": {"weight": {"format": "int8", "granularity": "per_channel"}}},
        "skip": ["*.0.*.k_proj"],
    },
}
BYTES: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": {"format": "int8"}, "activation": INT8},
    "w4a8-rows": {"weight": {"format": "int4", **LSQ}, "activation": INT8},
    "w4a8-groups": {"weight": {"format": "int4", "group_size": 32, **LSQ}, "activation": INT8},
    "w4a8-mixed": {
        "weight": {"format": "int4"},
        "activation": INT8,
        "rules": {"*.down_proj": {"weight": {"format": "int8"}}},
    },
}
STATIC: dict[str, dict[str, Any]] = {
    "w8a8-static": {
        "weight": {"format": "int8"},
        "activation": {**INT8, "range": "static", "calibrate": "mse", "scale_dtype": "bf16"},
    },
    "w8a8-static-asymmetric": {
        "weight": {"format": "int8"},
        "activation": {"format": "int8", "range": "static", "symmetric": False, "scale_dtype": "bf16"},
    },
}
FP8 = {"format": "fp8_e4m3"}
FLOATS: dict[str, dict[str, Any]] = {
    "fp8-rows": {"weight": FP8, "activation": FP8},
    "fp8-tensors": {
        "weight": {**FP8, "granularity": "per_tensor"},
        "activation": {**FP8, "range": "static", "scale_dtype": "bf16"},
    },
    "fp8-weights": {"weight": FP8},
}
CASES = PACKED | BYTES | STATIC | FLOATS
WORDS = "The quick brown fox jumps over the lazy dog"


def trained(model: PreTrainedModel, options: dict[str, Any]) -> tuple[Qat, PreTrainedModel]:
    """Prepared, calibrated, and moved as training moves it."""
    method = build_method(QatOptions.model_validate({"name": "qat", **options}))
    assert isinstance(method, Qat)
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    rows = [torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))]
    method.calibrate(model, rows, nullcontext, lambda items, total: items)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
                parameter.add_(torch.randn_like(parameter), alpha=0.01 if "lora" in name else 0.0)
    return method, model.eval()


def layers(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def export(name: str, model: PreTrainedModel, directory: Path, tokenizer: Any = None) -> dict[str, Any]:
    method, model = trained(model, CASES[name])
    options = CompressedTensorsOptions(max_shard_size="100KB")
    deployed = method.deployed(model, dtype=torch.float32)
    return write(deployed, options, directory, tokenizer=tokenizer, facts={})


@pytest.fixture(scope="module")
def consumed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """All cases exported, and read by one process that cannot import qtrain."""
    folder = tmp_path_factory.mktemp("trained")
    for name in CASES:
        model = tiny_model(initializer_range=0.1, tie_word_embeddings="tied" in name)
        export(name, model, folder / name, tiny_tokenizer)
    script = Path(__file__).with_name("consume.py")
    done = subprocess.run(
        [sys.executable, script, *(folder / name for name in CASES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Could not match" not in done.stderr
    return folder


def as_trained(name: str, tiny_model: Build) -> PreTrainedModel:
    return trained(tiny_model(initializer_range=0.1, tie_word_embeddings="tied" in name), CASES[name])[1]


@pytest.mark.parametrize("name", CASES)
def test_no_code_and_no_scale_is_another_one(consumed: Path, tiny_model: Build, name: str) -> None:
    found, expected = dict(read_records(consumed / name)), layers(as_trained(name, tiny_model))
    assert found.keys() == expected.keys() and len(found) == (13 if name == "mixed" else 14)
    for layer, record in found.items():
        codes, qparams = expected[layer].codes()
        assert int((record.codes != codes).sum()) == 0
        assert torch.equal(record.scale.float(), qparams.scale.float())
        assert record.spec.bits == expected[layer].weight_quantizer.spec.bits  # type: ignore[union-attr]
        assert torch.equal(record.dequantize(), expected[layer].quantized_weight())
    layout = json.loads((consumed / name / "config.json").read_text())["quantization_config"]
    kinds = {"int-quantized": BYTES | STATIC, "float-quantized": FLOATS, "pack-quantized": PACKED}
    assert name in kinds[layout["format"]]


@pytest.mark.parametrize("name", CASES)
def test_the_consumers_logits_are_those_of_the_training_graph(consumed: Path, tiny_model: Build, name: str) -> None:
    seen, model = load_file(consumed / f"{name}.seen"), as_trained(name, tiny_model)
    with torch.no_grad():
        logits: Tensor = model(seen["ids"]).logits
    assert float(logits.std()) > 0.3
    torch.testing.assert_close(seen["logits"], logits, rtol=0, atol=2e-5)
    assert torch.equal(seen["logits"].argmax(-1), logits.argmax(-1))


def test_another_convention_of_inputs_is_another_model(consumed: Path, tiny_model: Build) -> None:
    other = {"weight": {"format": "int8"}, "activation": {"format": "int8", "convention": "vllm"}}
    seen = load_file(consumed / "w8a8.seen")
    with torch.no_grad():
        logits = trained(tiny_model(initializer_range=0.1, tie_word_embeddings=False), other)[1](seen["ids"]).logits
    assert float((logits - seen["logits"]).abs().max()) > 1e-3


KV4 = {"kv_cache": {"format": "int4", "symmetric": False, "site": "pre_rope", "share": "per_token"}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "asymmetric beside int8 inputs": (
        {"weight": {"symmetric": False}, "activation": INT8},
        "int4 asymmetric per_channel",
        "method.weight.symmetric=true",
    ),
    "mid_rise": ({"weight": {"format": "int2", "mid_rise": True}}, "int2 half-integer", "method.weight.mid_rise=false"),
    "int5": ({"weight": {"format": "int5"}}, "int5 symmetric", "method.weight.format=int8"),
    "fp8 of the other kind": ({"weight": {"format": "fp8_e5m2"}}, "fp8_e5m2", "method.weight.format=int8"),
    "fp8 by int8": ({"weight": FP8, "activation": INT8}, "fp8_e4m3", "method.activation.format=fp8_e4m3"),
    "per_tensor": ({"weight": {"granularity": "per_tensor"}}, "per_tensor", "method.weight.granularity=per_channel"),
    "w2a8": (
        {"weight": {"format": "int2"}, "activation": INT8},
        "int8 symmetric per_token",
        "method.weight.format=int4",
    ),
    "static": (
        {"weight": {"format": "int8"}, "activation": {"format": "int8", "range": "static"}},
        "int8 symmetric per_tensor inputs",
        "method.activation.convention=compressed-tensors method.activation.scale_dtype=bf16",
    ),
    "inputs alone": ({"weight": None, "activation": INT8}, "unquantized weights", "method.weight.format=int8"),
    "cache alone": ({"weight": None, **KV4}, "no layer has integer weights", "method.weight.format=int4"),
    "mixed inputs": (
        {"weight": {"format": "int4"}, "activation": INT8, "rules": {"*.down_proj": {"activation": None}}},
        "unquantized ones",
        "export.format=merged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_layout_cannot_hold_is_refused_with_the_way_out(tmp_path: Path, tiny_model: Build, name: str) -> None:
    options, what, fix = REFUSED[name]
    method, model = trained(tiny_model(), options)
    deployed = method.deployed(model, dtype=torch.float32)
    with pytest.raises(ExportError) as caught:
        write(deployed, CompressedTensorsOptions(), tmp_path / "out", tokenizer=None, facts={})
    message = str(caught.value)
    assert what in message and fix in message and "export.format=merged" in message
    assert list(tmp_path.iterdir()) == []
    # Before the training the config alone says the same.
    with pytest.raises(ExportError) as early:
        CompressedTensorsOptions().check_trained(method.options.trained_layers())
    assert fix in str(early.value)
    # The way out is one.
    MergedOptions().check_trained(method.options.trained_layers())
    result = write_merged(deployed, MergedOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert result["base"] == "trained"
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    for layer, module in layers(model).items():
        assert torch.equal(plain.get_submodule(layer).weight, module.quantized_weight())


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_exported_is_known_before_the_training(name: str) -> None:
    options = QatOptions.model_validate({"name": "qat", **CASES[name]})
    CompressedTensorsOptions().check_trained(options.trained_layers())


@pytest.mark.parametrize(
    ("cache", "flag"),
    [
        ({"format": "int8"}, "vllm serve --kv-cache-dtype int8_per_token_head"),
        ({"format": "int4"}, "vllm serve --kv-cache-dtype int4_per_token_head is the nearest"),
        (KV4["kv_cache"], "vllm serve --kv-cache-dtype int4_per_token_head is the nearest"),
        ({"format": "fp8_e4m3"}, "vllm serve --kv-cache-dtype fp8_e4m3 is the nearest"),
        ({"format": "int2"}, "vLLM has no --kv-cache-dtype for it"),
    ],
    ids=str,
)
def test_a_cache_is_a_flag_for_who_serves(tmp_path: Path, tiny_model: Build, cache: dict[str, Any], flag: str) -> None:
    method, model = trained(tiny_model(), {"weight": {"format": "int4"}, "kv_cache": cache})
    deployed = method.deployed(model, dtype=torch.float32)
    result = write(deployed, CompressedTensorsOptions(), tmp_path / "out", tokenizer=None, facts={})
    assert len(result["notes"]) == 1 and result["notes"][0].endswith(flag)
    assert flag in (tmp_path / "out" / "README.md").read_text()
    # With the flag on, a loaded export computes what was trained.
    served = trained(tiny_model(), {"weight": {"format": "int4"}})[1]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert not torch.equal(served(ids).logits, expected)
        method.serve(model, served)
        assert torch.equal(served(ids).logits, expected)


def test_codes_that_do_not_fit_their_bits_are_not_read_back(tmp_path: Path, tiny_model: Build) -> None:
    method, model = trained(tiny_model(), BYTES["w4a8-rows"])
    out = tmp_path / "out"
    write(method.deployed(model, dtype=torch.float32), CompressedTensorsOptions(), out, tokenizer=None, facts={})
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 9
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj.weight: numbers from -7 to 9.*\n.*-8 .. 7"):
        dict(read_records(out))
