"""The one-pass kernels beside their plain twin, in Triton's interpreter; on a GPU the same cases run compiled."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtrain.numerics.rules import Dynamic, Learned, Rule, Static
from qtrain.numerics.spec import QuantSpec

triton = pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROW: dict[str, Any] = {"granularity": "per_channel", "group_size": None}
SPECS = [
    QuantSpec(**ROW, scale_dtype="bf16"),
    QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"),
    QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32", convention="compressed-tensors"),
    QuantSpec("int4", granularity="per_token", group_size=None, scale_dtype="fp32", symmetric=False),
    QuantSpec("int3", group_size=8, scale_dtype="fp16"),
    QuantSpec("int2", group_size=8, scale_dtype="bf16", mid_rise=True),
    QuantSpec("int4", group_size=24, scale_dtype="bf16", symmetric=False),
    QuantSpec("fp8_e4m3", granularity="per_token", group_size=None, scale_dtype="fp32"),
    QuantSpec("fp8_e4m3", group_size=8, scale_dtype="bf16"),
    QuantSpec("fp8_e5m2", **ROW, scale_dtype="fp16"),
]
SHAPES = [(1, 24), (3, 5, 48), (130, 72), (2, 4104)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape, generator=generator) * torch.logspace(-5, 1, shape[-1])
    x.view(-1, shape[-1])[-1] = 0.0
    device = "cuda" if ON_GPU else "cpu"
    return x.to(device, dtype), torch.randn(shape, generator=generator).to(device, dtype)


def learned(rule: type[Learned], spec: QuantSpec, x: torch.Tensor) -> tuple[Rule, torch.Tensor, torch.Tensor | None]:
    scale, zero_point = Dynamic(spec).qparams(x, None, None)
    scale = scale.float() * 0.7
    offset = None if zero_point is None else (spec.quant_min - zero_point.float()) * scale + 0.3 * scale
    return rule(spec), scale, offset


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.granularity}-{spec.scale_dtype}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_decides_the_same_codes(shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype) -> None:
    from qtrain.kernels import quantize_rows

    x, _ = tensors(shape, dtype, spec)
    assert torch.equal(quantize_rows.forward(Dynamic(spec), x, None, None), Dynamic(spec).forward(x))
    rule, scale, offset = learned(Learned, spec, x)
    assert torch.equal(quantize_rows.forward(rule, x, scale, offset), rule.forward(x, scale, offset))
    for narrow in (torch.float16, torch.bfloat16):
        assert torch.equal(
            quantize_rows.forward(rule, x, scale, offset, narrow), rule.forward(x, scale, offset).to(narrow)
        )
    # The baseline of rounding to nearest is asked with the learned range beside it.
    assert torch.equal(quantize_rows.forward(Dynamic(spec), x, scale, offset), Dynamic(spec).forward(x))


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("kind", [Learned, Static])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.granularity}-{spec.scale_dtype}")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_backward_is_the_twins(shape: tuple[int, ...], spec: QuantSpec, kind: type[Learned]) -> None:
    from qtrain.kernels import quantize_rows

    x, upper = tensors(shape, torch.float32, spec)
    rule, scale, offset = learned(kind, spec, x)
    assert isinstance(rule, Learned)
    needs = (True, True, offset is not None)
    found = quantize_rows.backward(rule, x, scale, offset, upper, needs)
    wanted = rule.backward(x, scale, offset, upper, needs)
    assert found.x is not None and wanted.x is not None and torch.equal(found.x, wanted.x)
    narrow = upper.to(torch.bfloat16)  # a weight's gradient as its product gives it
    other = quantize_rows.backward(rule, x, scale, offset, narrow, needs).x
    assert other is not None and torch.equal(other, rule.backward(x, scale, offset, narrow.float(), needs).x)
    for one, other in ((found.scale, wanted.scale), (found.offset, wanted.offset)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
def test_strides_and_nan() -> None:
    from qtrain.kernels import quantize_rows

    rule = Dynamic(SPECS[0])
    x, _ = tensors((24, 16), torch.float32, SPECS[0])
    assert torch.equal(quantize_rows.forward(rule, x.t(), None, None), rule.forward(x.t()))
    x[2, 3] = float("nan")
    assert bool(quantize_rows.forward(rule, x, None, None)[2, 3].isnan())


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_all_that_lies_between_two_floats_goes_where_torch_puts_it(format: str) -> None:
    """Every code of fp8, the middles between neighbours, and what lies next to those; NaN, and what saturates."""
    from qtrain.kernels import quantize_rows

    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[format]
    floats = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    floats = floats[floats.isfinite()].unique()
    middles = (floats[1:] + floats[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(far)) for far in (torch.inf, -torch.inf)]
    x = torch.cat([floats, middles, *beside, 4 * floats[-3:]])[None].to("cuda" if ON_GPU else "cpu")
    rule = Static(QuantSpec(format, granularity="per_channel", group_size=None, scale_dtype="fp32"))
    scale = torch.ones(1, 1, device=x.device)
    assert torch.equal(quantize_rows.forward(rule, x, scale, None), rule.forward(x, scale))
    x[0, 5] = torch.nan
    assert int(quantize_rows.forward(rule, x, scale, None).isnan().sum()) == 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.granularity}-{spec.scale_dtype}")
def test_what_the_kernels_know(spec: QuantSpec) -> None:
    from qtrain.kernels import quantize_rows

    assert quantize_rows.knows(Dynamic(spec).key, (3, 48)) and not quantize_rows.knows(Dynamic(spec).key, (0, 48))
    assert not quantize_rows.knows(Dynamic(replace(spec, granularity="per_tensor", group_size=None)).key, (3, 48))


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4], SPECS[6]], ids=lambda spec: f"{spec.format}-{spec.granularity}")
def test_gradients_of_a_range_whose_numbers_lie_apart(spec: QuantSpec) -> None:
    from qtrain.kernels import quantize_rows

    x, upper = tensors((6, 48), torch.float32, spec)
    rule, scale, offset = learned(Learned, spec, x)
    assert isinstance(rule, Learned)
    apart = scale.repeat(1, 2)[:, ::2] if scale.shape[1] == 1 else scale.t().contiguous().t()
    moved = None if offset is None else offset.t().contiguous().t()
    assert torch.equal(apart, scale) and not apart.is_contiguous()
    assert torch.equal(quantize_rows.forward(rule, x, apart, moved), rule.forward(x, scale, offset))
    needs = (True, True, offset is not None)
    found = quantize_rows.backward(rule, x, apart, moved, upper, needs)
    wanted = rule.backward(x, scale, offset, upper, needs)
    assert found.x is not None and wanted.x is not None and torch.equal(found.x, wanted.x)
    for one, other in ((found.scale, wanted.scale), (found.offset, wanted.offset)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
