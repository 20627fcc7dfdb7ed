"""LLM.int8() in blocks: to the bit bitsandbytes' own product of codes, the codes of an input made once."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.modules import frozen_weight as module
from qtrain.modules.frozen_linear import quantize_base
from qtrain.modules.frozen_weight import Int8, Workspace

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def int8_layer(rows: int, columns: int, bias: bool = True, device: torch.device = CPU) -> bnb.nn.Linear8bitLt:
    """Quantized from weights at random."""
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias))
    quantize_base(model, "int8", double_quant=False, compute_dtype=torch.float32, device=device)
    layer = model.to(device).train()[0]
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    return layer


def by_codes(layer: bnb.nn.Linear8bitLt, x: Tensor) -> Tensor:
    """What bitsandbytes computes on a GPU, on whatever device."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y: Tensor = MatMul8bitLt.apply(x, layer.weight, None, bias, layer.state)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    inside=st.integers(1, 40),
    outside=st.integers(1, 24),
    outliers=st.sampled_from([0.0, 1.0, 30.0]),
    threshold=st.sampled_from([0.0, 3.0, 6.0]),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_the_product_is_the_layers_own(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    inside: int,
    outside: int,
    outliers: float,
    threshold: float,
    bias: bool,
    turned: bool,
) -> None:
    torch.manual_seed(rows + 100 * inside)
    layer = int8_layer(4 * outside, 4 * inside, bias, device)
    layer.state.threshold = threshold
    x = torch.randn(rows, 4 * inside, device=device)
    x[:, ::3] *= outliers
    x = x.to(dtype)
    given = x.t().contiguous().t() if turned else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiplies_bytes", lambda _: True)
        found = Int8(layer, Workspace()).product(given, {})
    assert found.dtype == dtype
    assert torch.equal(found, by_codes(layer, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_weight_is_that_of_its_own_backward(device: torch.device, dtype: torch.dtype) -> None:
    layer = int8_layer(24, 40, device=device)
    other = int8_layer(8, 16, device=device)
    workspace = Workspace()
    for _ in range(2):  # the second in memory that another weight has written to
        dy = torch.randn(7, 24, device=device, dtype=dtype)
        x = torch.randn(7, 40, device=device, dtype=dtype, requires_grad=True)
        (wanted,) = torch.autograd.grad(by_codes(layer, x), x, dy)
        found = Int8(layer, workspace).input_gradient(dy)
        assert torch.equal(found, wanted)
        into = torch.randn_like(x)
        added = Int8(layer, workspace).input_gradient(dy, into.detach().clone())
        assert torch.allclose(added, into + wanted, atol=1e-5 if dtype == torch.float32 else 3e-2)
        Int8(other, workspace).weight(dtype)
    assert workspace.nbytes() == (24 * 40 * dtype.itemsize if device.type == "cuda" else 0)


def test_on_a_cpu_it_is_dense_as_bitsandbytes_has_it() -> None:
    layer = int8_layer(24, 40)
    x = torch.randn(5, 40)
    made: dict[str, Any] = {}
    y = Int8(layer, Workspace()).product(x, made)
    assert not made and torch.equal(y, layer(x))
    assert not torch.equal(y, by_codes(layer, x))


def test_the_codes_of_an_input_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For weights of the same threshold; another reads its own."""
    seen: list[float] = []
    own = module.int8_vectorwise_quant
    monkeypatch.setattr(module, "multiplies_bytes", lambda _: True)
    monkeypatch.setattr(
        module, "int8_vectorwise_quant", lambda x, threshold: seen.append(threshold) or own(x, threshold=threshold)
    )
    layers = [int8_layer(8, 16) for _ in range(4)]
    layers[2].state.threshold = 2.0
    x, made = 4 * torch.randn(5, 16), dict[str, Any]()
    found = [Int8(layer, Workspace()).product(x, made) for layer in layers]
    assert seen == [6.0, 2.0]
    assert all(torch.equal(y, by_codes(layer, x)) for layer, y in zip(layers, found, strict=True))
