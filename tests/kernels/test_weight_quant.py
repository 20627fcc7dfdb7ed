"""Whole layers over the kernels, in Triton's interpreter or on a GPU, beside the same layers in plain PyTorch."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.kernels import codes, fake_quantize, int8_matmul
from qtrain.kernels.int8_linear import int8_linear
from qtrain.kernels.quantized_linear import quantized_linear
from qtrain.numerics.affine import grouped, level_codes
from qtrain.numerics.rules import Dynamic, Learned, Rule, Static
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")
ROW: dict[str, Any] = {"granularity": "per_channel", "group_size": None, "scale_dtype": "bf16"}
SPECS = [
    QuantSpec("int4", **ROW),
    QuantSpec("int8", **ROW),
    QuantSpec("int4", group_size=8, scale_dtype="bf16"),
    QuantSpec("int4", group_size=8, scale_dtype="fp16", symmetric=False),
    QuantSpec("int2", group_size=24, scale_dtype="bf16", mid_rise=True),
]
TOKENS = Dynamic(QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers go through the kernels, CPU or not; names of those that were called."""
    from qtrain.kernels import code_rows, int8_tiles, quantize_rows

    called: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            called.append(name)
            return function(*given, **named)

        return call

    rows, tiles = counted("codes", code_rows.codes), counted("product", int8_tiles.int8_matmul)
    monkeypatch.setattr(quantize_rows, "fits", lambda rule, x: bool(x.numel()))
    monkeypatch.setattr(quantize_rows, "forward", counted("levels", quantize_rows.forward))
    monkeypatch.setattr(quantize_rows, "backward", counted("gradient", quantize_rows.backward))
    monkeypatch.setattr(codes, "_codes", lambda x, scale, factor, rule: rows(rule, x, scale, factor))
    monkeypatch.setattr(int8_matmul, "_matmul", tiles)
    monkeypatch.setattr(fake_quantize, "quantize_rows", quantize_rows)
    return called


def operands(rule: Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, W, and the scale and offset of a range that clips."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, 48, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(20, 48, generator=generator).to(DEVICE)
    if isinstance(rule, Dynamic):
        return x, weight, None, None
    scale, zero = Dynamic(rule.spec).qparams(weight, None, None)
    scale = scale.float() * 0.7
    offset = None if zero is None else (rule.spec.quant_min - zero.float()) * scale + 0.3 * scale
    return x, weight, scale, offset


def run(layer: Any, rule: Rule, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in operands(rule, dtype)]
    x, weight, scale, offset = leaves
    ranges = {"weight_scale": scale} | ({} if layer is int8_linear else {"weight_offset": offset})
    y: Tensor = layer(x, weight, None, weight_rule=rule, input_rule=TOKENS, **ranges, **options)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)]


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Dynamic, Learned, Static])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_simulated_layers_are_the_plain_ones(
    spec: QuantSpec, kind: type[Rule], dtype: torch.dtype, kernels: list[str]
) -> None:
    found = run(quantized_linear, kind(spec), dtype)
    # Inputs once, though the backward asks again; the weight in both; its gradient where its range is kept.
    assert kernels == ["levels"] * 3 + ["gradient"] * (kind is not Dynamic)
    kernels.clear()
    plain = run(quantized_linear, kind(spec), dtype, plain=True)
    assert not kernels and len(found) == len(plain)
    for one, other in zip(found[:3], plain[:3], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[3:], plain[3:], strict=True))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Dynamic, Learned, Static])
@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
@pytest.mark.parametrize("byte_gradient", [False, True])
def test_layers_of_bytes_are_the_plain_ones(
    spec: QuantSpec, kind: type[Rule], dtype: torch.dtype, byte_gradient: bool, kernels: list[str]
) -> None:
    found = run(int8_linear, kind(spec), dtype, byte_gradient=byte_gradient)
    assert kernels[:3] == ["codes", "codes", "product"] and kernels.count("product") == 1 + byte_gradient
    simulated = run(quantized_linear, kind(spec), dtype, plain=True)
    error = float((found[0] - simulated[0]).float().norm() / simulated[0].float().norm())
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)
    for one, other in zip(found[2:], simulated[2:], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    if byte_gradient:
        assert float((found[1] - simulated[1]).norm() / simulated[1].norm()) < 0.02
    else:
        assert torch.equal(found[1], simulated[1])


@KERNELS
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_the_gradient_of_scales_is_lsqs_in_float64(spec: QuantSpec) -> None:
    from qtrain.kernels import quantize_rows

    rule = Learned(spec)
    _, weight, scale, _ = operands(rule, torch.float32)
    assert scale is not None
    upper = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    found = quantize_rows.backward(rule, weight, scale, None, upper, (True, True, False))
    qparams = rule.qparams(weight, scale, None)
    u = grouped(weight, spec).double() / qparams.scale.double().unsqueeze(-1)
    inside = u.abs() <= spec.quant_max
    levels = level_codes(grouped(weight, spec), qparams, spec).double()
    pushed = (torch.where(inside, levels - u, levels) * grouped(upper, spec).double()).sum(-1)
    wanted = pushed / math.sqrt(u.shape[-1] * spec.quant_max)
    assert found.scale is not None and torch.allclose(found.scale.double(), wanted, rtol=1e-4, atol=1e-5)
    assert found.x is not None and torch.equal(found.x, upper * inside.view(upper.shape))
