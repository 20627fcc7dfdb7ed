"""Scales, codes and back, against torch's own fake quantization and against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.numerics.affine import SMALLEST_SCALE, QParams, choose_qparams, dequantize, largest_divisor, quantize
from qtrain.numerics.spec import QuantSpec

PER_ROW = {"granularity": "per_channel", "group_size": None}


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, QuantSpec]:
    size = draw(st.sampled_from([1, 2, 8, 16]))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    keys = draw(st.sampled_from([PER_ROW, {"group_size": size}]))
    spec = QuantSpec(
        format=f"int{draw(st.integers(2, 8))}",
        full_range=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(["fp16", "bf16"])),
        **keys,
    )
    torch.manual_seed(draw(st.integers(0, 10**6)))
    magnitude = 10.0 ** draw(st.integers(-7, 3))
    return torch.randn(rows, groups * size) * magnitude, spec


@settings(max_examples=100, deadline=None)
@given(weights())
def test_codes_are_in_range_and_no_weight_is_off_by_more_than_half_a_step(case: tuple[torch.Tensor, QuantSpec]) -> None:
    x, spec = case
    qparams = choose_qparams(x, spec)
    codes = quantize(x, qparams, spec)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert spec.quant_min <= int(codes.min()) <= int(codes.max()) <= spec.quant_max
    step = qparams.scale.float().repeat_interleave(x.shape[1] // qparams.scale.shape[1], dim=1)
    # A stored scale is off by at most 2^-9 (bf16), which 127 codes sum up to a quarter of a step.
    assert bool(((dequantize(codes, qparams, spec) - x).abs() <= step * 0.75).all())
    assert bool((qparams.scale.float() >= SMALLEST_SCALE).all())


@settings(max_examples=100, deadline=None)
@given(weights())
def test_torch_fake_quantize_agrees_given_the_scales(case: tuple[torch.Tensor, QuantSpec]) -> None:
    x, spec = case
    qparams = choose_qparams(x, spec)
    ours = dequantize(quantize(x, qparams, spec), qparams, spec)
    size = x.shape[1] // qparams.scale.shape[1]
    theirs = torch.fake_quantize_per_channel_affine(
        x.reshape(-1, size),
        qparams.scale.float().flatten(),
        torch.zeros(qparams.scale.numel(), dtype=torch.int32),
        0,
        spec.quant_min,
        spec.quant_max,
    ).reshape(x.shape)
    # torch multiplies by 1/s where we divide by s: a tie may fall to the neighbouring code.
    apart = ours != theirs
    step = qparams.scale.float().repeat_interleave(size, dim=1)
    assert bool(((ours - theirs).abs() <= step * 1.001).all())
    assert bool((((x / step) % 1 - 0.5).abs()[apart] < 1e-4).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_are_those_of_the_fp32_cast_in_any_layout(dtype: torch.dtype) -> None:
    spec = QuantSpec(group_size=16)
    x = torch.randn(48, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    turned = x.t()
    assert not turned.is_contiguous()
    expected = choose_qparams(x.float().t().contiguous(), spec)
    given = choose_qparams(turned, spec)
    assert torch.equal(given.scale, expected.scale)
    codes = quantize(x.float().t().contiguous(), expected, spec)
    assert torch.equal(quantize(turned, given, spec), codes)


def test_the_largest_weight_is_not_clipped() -> None:
    x = torch.tensor([[0.7, -0.1, 0.2, 0.35], [-0.7, 0.1, 0.2, 0.35]])
    spec = QuantSpec(group_size=4)
    qparams = choose_qparams(x, spec)
    assert quantize(x, qparams, spec).tolist() == [[7, -1, 2, 4], [-7, 1, 2, 4]]
    assert torch.allclose(qparams.scale.float(), torch.full((2, 1), 0.1), rtol=1e-3)


def test_full_range_holds_one_more_negative_code() -> None:
    x = torch.tensor([[-0.8, 0.7]])
    narrow, wide = QuantSpec(group_size=2), QuantSpec(group_size=2, full_range=True)
    scale = QParams(torch.tensor([[0.1]], dtype=torch.float16))
    assert quantize(x, scale, narrow).tolist() == [[-7, 7]]
    assert quantize(x, scale, wide).tolist() == [[-8, 7]]


@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-7])
def test_groups_of_zeros_and_of_denormals_are_defined(tiny: float) -> None:
    spec = QuantSpec(group_size=2)
    x = torch.tensor([[tiny, -tiny, 1.0, -1.0]])
    qparams = choose_qparams(x, spec)
    codes = quantize(x, qparams, spec)
    assert codes.tolist() == [[0, 0, 7, -7]]
    assert dequantize(codes, qparams, spec)[0, :2].tolist() == [0.0, 0.0]
    assert float(qparams.scale[0, 0]) == SMALLEST_SCALE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_what_no_scale_reaches_is_an_error_with_its_row(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(ModelError, match="1 of 3 rows.*the first is row 1"):
        choose_qparams(x, QuantSpec(group_size=2))


def test_shapes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ModelError, match="group_size=16") as caught:
        choose_qparams(torch.ones(2, 48), QuantSpec(group_size=32))
    assert caught.value.fix == "group_size=16"
    with pytest.raises(ModelError, match="group_size=32"):
        choose_qparams(torch.ones(4), QuantSpec())
    with pytest.raises(ModelError, match=r"\[2, 0\]"):
        choose_qparams(torch.ones(2, 0), QuantSpec(**PER_ROW))


def test_an_empty_weight_and_a_meta_weight_have_results() -> None:
    spec = QuantSpec(group_size=2)
    empty = torch.empty(0, 4)
    assert quantize(empty, choose_qparams(empty, spec), spec).shape == (0, 4)
    meta = torch.empty(3, 4, device="meta")
    qparams = choose_qparams(meta, spec)
    assert qparams.scale.shape == (3, 2)
    assert quantize(meta, qparams, spec).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_is_the_product_in_the_consumers_dtype(dtype: torch.dtype) -> None:
    spec = QuantSpec(format="int8", group_size=16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(x, spec)
    codes = quantize(x, qparams, spec)
    product = (codes.to(dtype).unflatten(-1, (-1, 16)) * qparams.scale.to(dtype).unsqueeze(-1)).flatten(-2)
    assert torch.equal(dequantize(codes, qparams, spec, dtype), product)


@settings(max_examples=50, deadline=None)
@given(weights())
def test_bf16_scales_are_the_same_number_in_fp16(case: tuple[torch.Tensor, QuantSpec]) -> None:
    x, spec = case
    scale = choose_qparams(x, spec).scale
    if spec.scale_dtype == "bf16":
        assert torch.equal(scale.to(torch.float16).float(), scale.float())


@pytest.mark.parametrize(
    ("columns", "asked", "used"), [(576, 128, 64), (576, 64, 64), (100, 128, None), (48, 32, 16), (96, 24, 24)]
)
def test_the_group_size_falls_back_to_a_divisor(columns: int, asked: int, used: int | None) -> None:
    assert largest_divisor(columns, asked) == used
