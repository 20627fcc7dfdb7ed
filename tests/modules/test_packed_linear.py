"""Layers of packed integers: their product, and the gradients of scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.kernels import packed_linear as kernel
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec

FORMATS = ("int2", "int3", "int4", "int5", "int8", "ternary")


def spec_of(format: str, symmetric: bool, group_size: int | None, **others: Any) -> QuantSpec:
    if group_size is None:
        return QuantSpec(format, symmetric or format == "ternary", "per_channel", None, **others)
    return QuantSpec(format, symmetric or format == "ternary", "per_group", group_size, **others)


def record_of(spec: QuantSpec, out: int, columns: int, seed: int = 0, outliers: int = 0) -> LinearRecord:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    qparams = choose_qparams(weight, spec)
    taken = None
    if outliers:
        index = torch.randperm(weight.numel(), generator=generator)[:outliers].sort().values
        taken = Outliers(index.to(torch.int32), (3 * weight.flatten()[index]).to(qparams.scale.dtype))
    return LinearRecord(quantize(weight, qparams, spec), *qparams, spec, taken)


def keeping(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that notes what is saved."""

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    return note


def by_hand(record: LinearRecord, scale: Tensor, zero: Tensor | None) -> Tensor:
    """W in float64, differentiable in scale and zero point."""
    codes = record.codes.double().view(*scale.shape, -1)
    levels = codes + (0.5 if record.spec.mid_rise else 0.0)
    weight = ((levels if zero is None else levels - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    if record.outliers is not None:
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[record.outliers.index.long()] = True
        kept = torch.zeros(weight.numel(), dtype=torch.float64)
        kept[record.outliers.index.long()] = record.outliers.value.double()
        weight = torch.where(mask, kept, weight.flatten()).view_as(weight)
    return weight


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 4, 12]),
    out=st.integers(1, 9),
    groups=st.integers(1, 3),
    outliers=st.sampled_from([0, 3]),
    bias=st.booleans(),
    zero_points=st.booleans(),
    chunk=st.sampled_from([1, 64, 2**26]),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_float64(
    format: str,
    symmetric: bool,
    group_size: int | None,
    out: int,
    groups: int,
    outliers: int,
    bias: bool,
    zero_points: bool,
    chunk: int,
    seed: int,
) -> None:
    spec = spec_of(format, symmetric, group_size)
    record = record_of(spec, out, 12 * groups, seed, outliers)
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(out, generator=generator) if bias else None
    layer = PackedLinear.from_record(record, added)
    layer.train_ranges(zero_points=zero_points)
    x = torch.randn(2, 5, 12 * groups, generator=generator, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(2, 5, out, generator=generator, dtype=torch.float64)
    before, kernel.CHUNK_BYTES = kernel.CHUNK_BYTES, chunk
    try:
        y = layer(x)
        (y * mix).sum().backward()
    finally:
        kernel.CHUNK_BYTES = before

    scale = record.scale.double().requires_grad_()
    zero = None if record.zero_point is None else record.zero_point.double().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = twin @ by_hand(record, scale, zero).t() + (0 if added is None else added.double())
    (expected * mix).sum().backward()
    assert torch.allclose(y, expected, atol=1e-9, rtol=1e-6)
    assert x.grad is not None and twin.grad is not None and torch.allclose(x.grad, twin.grad, atol=1e-9, rtol=1e-6)
    assert layer.scale.grad is not None and scale.grad is not None
    assert torch.allclose(layer.scale.grad.double(), scale.grad, atol=1e-4, rtol=1e-5)
    if zero_points and zero is not None:
        assert layer.zero is not None and layer.zero.grad is not None and zero.grad is not None
        assert torch.allclose(layer.zero.grad.double(), zero.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_weight_is_the_records_bit_for_bit(format: str) -> None:
    for symmetric in (True, False):
        record = record_of(spec_of(format, symmetric, 12), 7, 36, outliers=4)
        layer = PackedLinear.from_record(record)
        again = layer.record()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(layer.dense_weight(dtype), record.dequantize(dtype))
        assert torch.equal(again.codes, record.codes) and torch.equal(again.scale, record.scale)
        assert (again.zero_point is None) == (record.zero_point is None)
        if again.zero_point is not None and record.zero_point is not None:
            assert torch.equal(again.zero_point, record.zero_point)


def test_half_integer_levels() -> None:
    spec = spec_of("int2", True, 4, mid_rise=True)
    record = record_of(spec, 3, 8)
    assert torch.equal(PackedLinear.from_record(record).dense_weight(), record.dequantize())


def test_what_trains_is_rounded_as_it_is_stored() -> None:
    layer = PackedLinear.from_record(record_of(spec_of("int4", False, 4), 6, 16))
    layer.train_ranges(zero_points=True)
    with torch.no_grad():
        layer.scale.mul_(1.0009)
        assert layer.zero is not None
        layer.zero.add_(0.7)
    record = layer.record()
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), x @ record.dequantize().t())
    assert record.scale.dtype == torch.float16
    assert record.zero_point is not None and record.zero_point.dtype == torch.int8


@pytest.mark.parametrize(("group_size", "saves_input"), [(None, False), (8, True)])
def test_the_backward_keeps_one_activation_and_no_weight(group_size: int | None, saves_input: bool) -> None:
    layer = PackedLinear.from_record(record_of(spec_of("int4", True, group_size), 24, 16))
    layer.train_ranges()
    kept: list[Tensor] = []
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keeping(kept), lambda t: t):
        y = layer(x)
    shapes = sorted(tuple(t.shape) for t in kept)
    assert shapes == sorted([(5, 16) if saves_input else (5, 24), tuple(layer.scale.shape)])
    y.sum().backward()


def test_a_frozen_layer_keeps_no_activation() -> None:
    layer = PackedLinear.from_record(record_of(spec_of("int4", True, 8), 24, 16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keeping(kept), lambda t: t):
        layer(torch.randn(5, 16, requires_grad=True))
    assert [tuple(t.shape) for t in kept] == [(24, 2)]


def test_bytes_are_those_of_the_codes() -> None:
    layer = PackedLinear.from_record(record_of(spec_of("int3", False, 32), 64, 256))
    assert layer.stored_bytes() == (64 * 256 * 3 + 64 * 8 * 16 + 64 * 8 * 3) // 8
    assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == layer.stored_bytes()


def test_autocast_multiplies_in_its_dtype_and_scales_keep_theirs() -> None:
    record = record_of(spec_of("int4", True, 8), 6, 16)
    layer = PackedLinear.from_record(record).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, x.bfloat16() @ record.dequantize(torch.bfloat16).t())
    layer.train_ranges()
    assert layer.to(torch.bfloat16).scale.dtype == torch.float32


@pytest.mark.parametrize("format", ["binary", "fp8_e4m3"])
def test_codes_that_are_no_small_integers_are_refused(format: str) -> None:
    with pytest.raises(ModelError, match="int2 .. int8 or ternary"):
        PackedLinear.from_record(record_of(spec_of(format, True, None), 4, 8))


@pytest.mark.parametrize("trained", [False, True])
def test_zero_points_of_any_value_are_kept_as_they_are(trained: bool) -> None:
    """HQQ's: w = (q - z) s with z in floats; no product, gradient or record rounds it."""
    whole = record_of(spec_of("int4", False, 8), 6, 16)
    assert whole.zero_point is not None
    points = whole.zero_point.float() + 0.375
    record = LinearRecord(whole.codes, whole.scale, points, whole.spec)
    layer = PackedLinear.from_record(record)
    assert not layer.whole_zero_points and PackedLinear.from_record(whole).whole_zero_points
    assert "fractional" in repr(layer)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(layer.dense_weight(dtype), record.dequantize(dtype))
    assert not torch.equal(layer.dense_weight(), whole.dequantize())
    again = layer.to(torch.bfloat16).record()
    assert again.zero_point is not None and torch.equal(again.zero_point, points)
    assert torch.equal(PackedLinear.from_record(again).dense_weight(), record.dequantize())
    assert layer.stored_bytes() == (6 * 16 * 4 + 12 * 16 + 12 * 32) // 8
    layer.train_ranges(zero_points=trained)
    x, mix = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (layer(x) * mix).sum().backward()
    scale, zero = whole.scale.double().requires_grad_(), points.double().requires_grad_()
    (x @ by_hand(record, scale, zero).t() * mix).sum().backward()
    assert layer.scale.grad is not None and scale.grad is not None and zero.grad is not None
    assert torch.allclose(layer.scale.grad.double(), scale.grad, atol=1e-4, rtol=1e-5)
    if trained:
        assert layer.zero is not None and layer.zero.grad is not None
        assert torch.allclose(layer.zero.grad.double(), zero.grad, atol=1e-4, rtol=1e-5)
        with torch.no_grad():
            layer.zero.add_(0.1)
        stored = layer.stored_zero_point()
        assert stored is not None and torch.equal(stored, points + 0.1)
        layer.set_ranges(whole.scale)
        assert torch.equal(layer.dense_weight(), record.dequantize())
