"""Weights that are merged and quantized some rows at a time: what whole ones give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.errors import ExportError
from qtrain.export.integers.records import quantize_linear
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.frozen_linear import dense_weight
from qtrain.numerics import row_parts
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Build = Callable[..., PreTrainedModel]
SPECS = [
    QuantSpec(format="int4", granularity="per_group", group_size=32),
    QuantSpec(format="int4", symmetric=False, granularity="per_group", group_size=32),
    QuantSpec(format="int8", granularity="per_channel", group_size=None),
    QuantSpec(format="fp8_e4m3", granularity="per_channel", group_size=None, scale_dtype="bf16"),
    QuantSpec(format="int8", granularity="per_tensor", group_size=None),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """64 columns in parts of five rows, by two threads."""
    monkeypatch.setattr(row_parts, "PART", 5 * 64 + 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def under_adapters(model: PreTrainedModel, **keys: Any) -> tuple[DeployedTensor, Any]:
    """v_proj [32, 64] of the first layer, its adapter stirred."""
    options = METHODS.get("qlora").model_validate({"name": "qlora", "r": 4, **keys})
    method = build_method(options)
    prepared = method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    layer: Any = prepared.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(3))
        if keys.get("dora"):
            layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    deployed = {t.name: t for t in method.deployed(prepared, dtype=torch.float32).tensors()}
    return deployed["model.layers.0.self_attn.v_proj.weight"], layer


def in_float64(layer: Any) -> Tensor:
    """W + (lora_alpha / r) B A, rows scaled to DoRA's magnitudes."""
    weight = dense_weight(layer.get_base_layer()).double()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    merged = weight + layer.scaling["default"] * (b @ a)
    if "default" in layer.lora_magnitude_vector:
        merged *= (layer.lora_magnitude_vector["default"].weight.double() / merged.norm(dim=1))[:, None]
    found: Tensor = merged.detach()
    return found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["none", "nf4", "int8"])
def test_rows_are_those_of_the_merged_weight(tiny_model: Build, base: str, dora: bool) -> None:
    tensor, layer = under_adapters(tiny_model(), base=base, dora=dora)
    assert tensor.rows is not None
    value, rows = tensor.value(), tensor.rows()
    assert value.shape == tensor.shape == (32, 64) and value.dtype == torch.float32
    assert torch.equal(torch.cat([rows(slice(first, first + 5)) for first in range(0, 32, 5)]), value)
    torch.testing.assert_close(value.double(), in_float64(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("scales", ["absmax", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.granularity}-{spec.symmetric}")
def test_codes_are_those_of_the_whole_weight(tiny_model: Build, spec: QuantSpec, scales: str, weighed: bool) -> None:
    tensor, _ = under_adapters(tiny_model(), base="none")
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) if weighed else None
    value = tensor.value()
    qparams = search_qparams(value, spec, importance) if scales == "mse" else choose_qparams(value, spec)
    for given in (tensor, replace(tensor, rows=None)):
        record = quantize_linear(given, spec, scales, importance)
        assert torch.equal(record.scale, qparams.scale) and record.scale.dtype == qparams.scale.dtype
        assert (record.zero_point is None) == spec.symmetric
        if qparams.zero_point is not None:
            assert record.zero_point is not None and torch.equal(record.zero_point, qparams.zero_point)
        codes = quantize(value, qparams, spec)
        assert record.codes.dtype == codes.dtype and torch.equal(record.codes.float(), codes.float())


def test_what_is_wrong_is_counted_in_the_whole_weight(tiny_model: Build) -> None:
    tensor, layer = under_adapters(tiny_model(), base="none")
    with torch.no_grad():
        layer.lora_B["default"].weight[[13, 29]] = torch.nan
    with pytest.raises(ExportError, match=r"2 of 32 rows hold NaN.*the first is row 13"):
        quantize_linear(tensor, SPECS[0], "absmax")
