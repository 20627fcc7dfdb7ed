"""W8A8 exports on oneDNN's int8 kernels: the sums are those of the integers, and of the training graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.export.config import FORMATS
from qtrain.kernels.int8_product import int8_product, int8_product_is_exact, pack_int8
from qtrain.models.packed import load_packed
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.int8_linear import Int8Linear, has_int8_product, use_int8_products
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord
from qtrain.registry import resolve

Build = Callable[..., PreTrainedModel]
Train = Callable[..., Any]
vnni = pytest.mark.skipif(not int8_product_is_exact(), reason="this CPU has no VNNI")
INT8 = {"format": "int8", "convention": "compressed-tensors"}
STATIC = {"format": "int8", "range": "static", "scale_dtype": "bf16"}
ROWS = {"weight": {"format": "int8"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8": ("compressed-tensors", {**ROWS, "activation": INT8}),
    "w8a8-static": ("compressed-tensors", {**ROWS, "activation": {**INT8, **STATIC}}),
    "w8a8-static-asymmetric": ("compressed-tensors", {**ROWS, "activation": {**STATIC, "symmetric": False}}),
    "w4a8": ("compressed-tensors", {"weight": {"format": "int4"}, "activation": INT8}),
    "torchao": ("torchao", {**ROWS, "activation": {**INT8, "convention": "torchao"}, "kernels": "int8"}),
    "torchao-asymmetric": ("torchao", {**ROWS, "activation": {"format": "int8", "symmetric": False}}),
}


@vnni
@given(
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 7, 64, 576]),
    out=st.sampled_from([1, 5, 32, 130]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_are_those_of_the_integers(rows: int, columns: int, out: int, extreme: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-128, 128, (n, columns), generator=draw).to(torch.int8) for n in (rows, out))
    if extreme:
        x, weight = torch.where(x < 0, -128, 127).to(torch.int8), torch.where(weight < 0, -128, 127).to(torch.int8)
    found = int8_product(x, pack_int8(weight), torch.ones(out))
    assert torch.equal(found.long(), x.long() @ weight.long().t())


@vnni
@given(
    symmetric=st.booleans(),
    convention=st.sampled_from(["vllm", "compressed-tensors"]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_layer_is_the_fake_quantized_one(symmetric: bool, convention: str, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    section = QuantizerSection(format="int8", symmetric=symmetric, convention=convention if symmetric else "vllm")
    trained = QuantLinear.from_linear(torch.nn.Linear(96, 40, bias), WeightSection(format="int8"), section)
    codes, qparams = trained.codes()
    assert trained.weight_quantizer is not None
    record = LinearRecord(codes, qparams.scale, None, trained.weight_quantizer.spec)
    layer = Int8Linear(PackedLinear.from_record(record, trained.bias, section))
    x = torch.randn(2, 5, 96) * torch.logspace(-3, 3, 5)[:, None]
    assert trained.input_quantizer is not None
    levels, weight = trained.input_quantizer(x).double(), trained.quantized_weight().detach().double()
    exact = levels @ weight.t() + (trained.bias.double() if bias else 0.0)
    largest = levels.abs() @ weight.abs().t() + 1
    with torch.no_grad():
        assert float(((layer(x) - exact).abs() / largest).max()) < 3e-7
        assert float(((trained(x) - exact).abs() / largest).max()) < 3e-7
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, layer(x.bfloat16()), rtol=0, atol=0)


@vnni
@pytest.mark.parametrize("name", CASES)
def test_an_export_computes_what_the_training_graph_did(
    tmp_path: Path, tiny_model: Build, qat_trained: Train, name: str
) -> None:
    export_format, training = CASES[name]
    method, model, layers = qat_trained(tiny_model(initializer_range=0.1), training)
    options = FORMATS.get(export_format).model_validate({"format": export_format})
    deployed = method.deployed(model, dtype=torch.float32)
    resolve(options.implementation)(deployed, options, tmp_path / "out", tokenizer=None, facts={})
    served: Any = load_packed(tmp_path / "out", torch.float32)
    assert set(use_int8_products(served)) == layers.keys()
    for layer, module in layers.items():
        x = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = module(x)
            torch.testing.assert_close(served.get_submodule(layer)(x), expected, rtol=1e-5, atol=1e-5)
    ids = torch.arange(5, 25)[None]
    greedy: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 3}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found, expected = served(ids).logits, model(ids).logits
        # By absmax / 127.5 the largest input of each token lies between two codes, and the last bit of a sum decides;
        # divided by s it comes out the same here, multiplied by 1 / s it does not.
        within = 0.02 if name == "torchao" else 1e-5
        assert float((found - expected).norm()) < within * float(expected.norm())
        ours, theirs = (each.generate(ids, attention_mask=mask, **greedy) for each in (served, model))
    assert name == "torchao" or torch.equal(ours, theirs)


def test_other_layers_stay_as_they_are(tmp_path: Path, tiny_model: Build, qat_trained: Train) -> None:
    groups = {"weight": {"format": "int4", "group_size": 32}, "activation": INT8}
    method, model, _ = qat_trained(tiny_model(), groups)
    options = FORMATS.get("compressed-tensors").model_validate({})
    resolve(options.implementation)(
        method.deployed(model, dtype=torch.float32), options, tmp_path / "out", tokenizer=None, facts={}
    )
    served = load_packed(tmp_path / "out", torch.float32)
    assert use_int8_products(served) == []
    layer = served.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, PackedLinear) and not has_int8_product(layer)
    with pytest.raises(ModelError, match="int4 symmetric per_group"):
        Int8Linear(layer)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_cpu_without_the_instructions_is_told_apart() -> None:
    """oneDNN restricted to AVX2, whose sums of pairs saturate in 16 bits."""
    script = "from qtrain.kernels.int8_product import int8_product_is_exact as exact; print(exact())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
