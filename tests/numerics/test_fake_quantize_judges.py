"""Fake quantization before its judges: torch's own kernels, torchao, and the derivative of the surrogate.

A straight-through backward is not the derivative of its forward, so finite differences of the forward must fail on it.
They must agree on the surrogate: the forward in float64 with every round(u) replaced by u + r, r = round(u0) - u0
frozen at the point where the gradient is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels.fake_quantize import fake_quantize
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, grouped, quantize
from qtrain.numerics.rules import SEQ_EDGE, Dynamic, Learned, Pact, Rule, Static
from qtrain.numerics.spec import QuantSpec

Surrogate = Callable[..., Tensor]
FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(**options: Any) -> QuantSpec:
    """A spec whose scales are not rounded, and one scale a row unless said otherwise."""
    return QuantSpec(**{"granularity": "per_channel", "group_size": None, "scale_dtype": "fp32", **options})


def off_the_kinks(x: Tensor, scale: Tensor) -> Tensor:
    """x moved where x / s lies within 0.02 of a multiple of 1/2, or of the edge where SEQ clips: there the surrogate
    has a kink, or fp32 may round the other way than float64.
    """
    u = x.double() / scale.double()
    for _ in range(4):
        near_half = (u * 2 - (u * 2).round()).abs() < 0.04
        near_edge = torch.stack([(u.abs() - SEQ_EDGE * reach).abs() < 0.02 for reach in (1.5, 2.0)]).any(0)
        u = torch.where(near_half | near_edge, u + 0.047, u)
    return (u * scale.double()).float()


def ours(rule: Rule, x: Tensor, upper: Tensor, *learned: Tensor) -> list[Tensor]:
    """Gradients of x and of what is learned, by the rule's backward; without LSQ's factor."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, *learned)]
    fake_quantize(leaves[0], rule, *leaves[1:]).backward(upper)
    factor = 1.0
    if isinstance(rule, Learned):
        factor = math.sqrt(grouped(x, rule.spec).shape[-1] * rule.spec.quant_max)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [gradients[0], *(gradient * factor for gradient in gradients[1:])]


def judged(surrogate: Surrogate, upper: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the surrogate in float64, themselves checked by finite differences."""
    leaves = [leaf.double().requires_grad_() for leaf in inputs]
    assert torch.autograd.gradcheck(surrogate, tuple(leaves), eps=1e-7, atol=1e-5)
    return list(torch.autograd.grad(surrogate(*leaves), leaves, upper.double(), allow_unused=False))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double().reshape(other.shape), other, rtol=2e-5, atol=2e-5)


def frozen(value: Tensor) -> Tensor:
    """r = round(u) - u, a constant."""
    return value.detach().round() - value.detach()


def in_groups(x: Tensor, spec: QuantSpec) -> Tensor:
    """[groups, numbers that share a scale], from the spec's description."""
    size = {"per_tensor": x.numel(), "per_channel": x.shape[-1]}.get(spec.granularity, spec.group_size)
    assert size is not None
    return x.reshape(-1, size)


def lsq(
    spec: QuantSpec, x0: Tensor, s0: Tensor, low: float, high: float, shift: float = 0.0, cut: float = 1.0
) -> Surrogate:
    """x = (round(clip(x / s, cut low, cut high) - shift) + shift) s."""
    clipped = (in_groups(x0.double(), spec) / s0.double().reshape(-1, 1)).clamp(cut * low, cut * high) - shift
    r = frozen(clipped)

    def surrogate(x: Tensor, s: Tensor) -> Tensor:
        s = s.reshape(-1, 1)
        u = (in_groups(x, spec) / s).clamp(cut * low, cut * high) - shift
        return ((u + r + shift) * s).reshape(x.shape)

    return surrogate


# The surrogate


LSQ_SPECS = {
    "per_tensor": exact(format="int4", granularity="per_tensor"),
    "per_channel": exact(format="int3"),
    "full range": exact(format="int4", full_range=True),
    "per_group": exact(format="int4", granularity="per_group", group_size=4),
    "per_block": exact(format="int8", granularity="per_block", group_size=8),
    "int2": exact(format="int2"),
    "compressed-tensors": exact(format="int8", convention="compressed-tensors"),
}


def scale_for(x: Tensor, spec: QuantSpec, seed: int) -> Tensor:
    """Scales that clip a part of the numbers, [rows, groups]."""
    groups = grouped(x, spec)
    width = 0.4 + 0.8 * torch.rand(groups.shape[:2], generator=torch.Generator().manual_seed(seed))
    return groups.abs().amax(-1) * width / spec.quant_max


def moved(x: Tensor, spec: QuantSpec, scale: Tensor) -> Tensor:
    return off_the_kinks(grouped(x, spec), scale.unsqueeze(-1)).reshape(x.shape)


@pytest.mark.parametrize("kind", LSQ_SPECS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_lsq_is_the_derivative_of_its_surrogate(kind: str, seed: int) -> None:
    spec, x, upper = LSQ_SPECS[kind], normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    scale = scale_for(x, spec, seed)
    x = moved(x, spec, scale)
    found = ours(Learned(spec), x, upper, scale)
    assert_same(found, judged(lsq(spec, x, scale, spec.quant_min, spec.quant_max), upper, x, scale))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_static_ranges_pass_x_inside_and_nothing_outside(seed: int, bits: int) -> None:
    spec, x, upper = exact(format=f"int{bits}", granularity="per_tensor"), normal(4, 8, seed=seed), normal(4, 8, seed=7)
    scale = scale_for(x, spec, seed)
    x = moved(x, spec, scale)
    found = ours(Static(spec), x, upper, scale)
    expected = judged(lsq(spec, x, scale, spec.quant_min, spec.quant_max), upper, x, scale)
    assert_same(found[:1], expected[:1])
    assert not found[1].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_seq_of_two_bits_is_the_derivative_of_its_surrogate(seed: int) -> None:
    # x = a (round(clip(x/a, -.99, .99) 2 - 1/2) + 1/2) / 2 with a = 2 s: levels -+a/4, -+3a/4.
    spec, x, upper = exact(format="int2", mid_rise=True), normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    bound = 0.4 + 1.5 * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))
    x = moved(x, spec, bound / 2)
    r = frozen((x.double() / bound.double()).clamp(-0.99, 0.99) * 2 - 0.5)

    def surrogate(x: Tensor, a: Tensor) -> Tensor:
        return a * (((x / a).clamp(-0.99, 0.99) * 2 - 0.5 + r) + 0.5) / 2

    torch.testing.assert_close(
        fake_quantize(x, Learned(spec), bound / 2).double(), surrogate(x.double(), bound.double())
    )
    d_x, d_scale = ours(Learned(spec), x, upper, bound / 2)
    assert_same([d_x, d_scale / 2], judged(surrogate, upper, x, bound))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_ternary_is_the_derivative_of_its_surrogate(seed: int) -> None:
    # x = a round(clip(x/a, -.99, .99) 1.5) / 1.5 with a = 1.5 s.
    spec, x, upper = exact(format="ternary"), normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    bound = 0.4 + 1.5 * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))
    x = moved(x, spec, bound / 1.5)
    r = frozen((x.double() / bound.double()).clamp(-0.99, 0.99) * 1.5)

    def surrogate(x: Tensor, a: Tensor) -> Tensor:
        return a * ((x / a).clamp(-0.99, 0.99) * 1.5 + r) / 1.5

    torch.testing.assert_close(
        fake_quantize(x, Learned(spec), bound / 1.5).double(), surrogate(x.double(), bound.double())
    )
    d_x, d_scale = ours(Learned(spec), x, upper, bound / 1.5)
    assert_same([d_x, d_scale / 1.5], judged(surrogate, upper, x, bound))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_elastic_binary_is_the_derivative_of_its_surrogate(seed: int) -> None:
    # x = s sign(x): sign is a constant for s, and for x it counts as x / s0 inside [-s0, s0]. BiT's and ParetoQ's
    # sources give ds = sign(x) everywhere; freezing sign(u) - u instead would give sign(u) - u inside.
    spec, x, upper = exact(format="binary"), normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    scale = 0.4 + torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))
    x = moved(x, spec, scale)
    sign, s0 = x.double().sign(), scale.double()
    rest = s0 * sign - x.double().clamp(-s0, s0)

    def surrogate(x: Tensor, s: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, -s0), s0) + rest + (s - s0) * sign

    assert torch.equal(fake_quantize(x, Learned(spec), scale), scale * x.sign())
    assert_same(ours(Learned(spec), x, upper, scale), judged(surrogate, upper, x, scale))


def lsq_plus(spec: QuantSpec, x0: Tensor, s0: Tensor, offset0: Tensor) -> Surrogate:
    """x = (clip(round(x / s) + z) - z) s with z = round(-offset / s) + quant_min, both rounds straight through."""
    low, high = spec.quant_min, spec.quant_max
    r_z = frozen(-offset0.double() / s0.double())
    z0 = -offset0.double() / s0.double() + r_z + low
    r = frozen((x0.double() / s0.double() + z0).clamp(low, high))

    def surrogate(x: Tensor, s: Tensor, offset: Tensor) -> Tensor:
        z = -offset / s + r_z + low
        return ((x / s + z).clamp(low, high) + r - z) * s

    return surrogate


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_lsq_plus_is_the_derivative_of_its_surrogate(seed: int, bits: int) -> None:
    spec, x, upper = exact(format=f"int{bits}", symmetric=False), normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    draw = torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(seed))
    scale = (0.5 + draw[0]) * 3 / 2**bits
    offset = -1.2 * draw[1] - 0.05
    x = moved(x, spec, scale)
    found = ours(Learned(spec), x, upper, scale, offset)
    assert_same(found, judged(lsq_plus(spec, x, scale, offset), upper, x, scale, offset))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), signed=st.booleans())
def test_pact_is_the_derivative_of_its_surrogate(seed: int, bits: int, signed: bool) -> None:
    # y = 0.5 (|x| - |x - a| + a), quantized with what rounding adds frozen as a whole: dy_q/da = 1[x >= a], no more.
    spec = exact(format=f"int{bits}", granularity="per_tensor", symmetric=signed)
    x, upper = 2 * normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    bound = torch.tensor([[0.7 + seed / 500]])
    steps = spec.quant_max if signed else 2**bits - 1
    x = moved(x, spec, bound / steps)

    def clipped(x: Tensor, a: Tensor) -> Tensor:
        return 0.5 * ((x + a).abs() - (x - a).abs()) if signed else 0.5 * (x.abs() - (x - a).abs() + a)

    y = clipped(x.double(), bound.double())
    a = bound.double()
    rest = (y * steps / a).round() * a / steps - y
    torch.testing.assert_close(fake_quantize(x, Pact(spec), bound).double(), y + rest, rtol=1e-6, atol=1e-6)

    def surrogate(x: Tensor, a: Tensor) -> Tensor:
        return clipped(x, a) + rest

    assert_same(ours(Pact(spec), x, upper, bound), judged(surrogate, upper, x, bound))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["per_tensor", "per_channel", "per_token", "per_group"]),
    scale_dtype=st.sampled_from(["fp16", "bf16", "fp32"]),
)
def test_min_max_is_the_derivative_of_its_surrogate(
    seed: int, bits: int, symmetric: bool, granularity: str, scale_dtype: str
) -> None:
    # With the range as it is for this tensor and nothing to clip, x + r s: the identity, bit for bit.
    size = 4 if granularity == "per_group" else None
    spec = QuantSpec(f"int{bits}", symmetric, granularity, size, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    x, upper = normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    rest = (fake_quantize(x, Dynamic(spec)) - x).double()
    expected = judged(lambda x: x + rest, upper, x)
    found = ours(Dynamic(spec), x, upper)
    assert_same(found, expected)
    assert torch.equal(found[0], upper)


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16"])
def test_the_scale_as_stored_is_what_is_differentiated(scale_dtype: str) -> None:
    # The master is rounded, its gradient passes straight through: the derivative at the stored scale.
    spec = exact(format="int4", scale_dtype=scale_dtype)
    x, upper, master = normal(4, 8), normal(4, 8, seed=1), torch.full((4, 1), 0.31234567)
    stored = master.to(torch.float16 if scale_dtype == "fp16" else torch.bfloat16).float()
    assert not torch.equal(stored, master)
    x = moved(x, spec, stored)
    found = ours(Learned(spec), x, upper, master)
    assert_same(found, judged(lsq(spec, x, stored, -7, 7), upper, x, stored))


def test_finite_differences_of_the_forward_itself_disagree() -> None:
    spec, x = exact(format="int4"), normal(2, 8)
    scale = torch.full((2, 1), 0.3)
    x = moved(x, spec, scale)
    moved_x = fake_quantize(x + 1e-4, Learned(spec), scale) - fake_quantize(x, Learned(spec), scale)
    assert not moved_x.any()
    assert ours(Learned(spec), x, torch.ones(2, 8), scale)[0].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), name=st.sampled_from(["fp8_e4m3", "fp8_e5m2"]))
def test_learned_scales_of_fp8_are_the_derivative_of_their_surrogate(seed: int, name: str) -> None:
    dtype: torch.dtype = getattr(torch, FP8[name])
    largest = torch.finfo(dtype).max
    spec, x, upper = exact(format=name), largest * normal(4, 8, seed=seed), normal(4, 8, seed=seed + 1)
    scale = scale_for(x, spec, seed)
    u0 = (x.double() / scale.double()).clamp(-largest, largest)
    r = u0.float().to(dtype).double() - u0

    def surrogate(x: Tensor, s: Tensor) -> Tensor:
        return ((x / s).clamp(-largest, largest) + r) * s

    d_x, d_scale = judged(surrogate, upper, x, scale)
    found = ours(Learned(spec), x, upper, scale)
    assert_same(found[:1], [d_x])
    torch.testing.assert_close(found[1].double(), d_scale, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_name", ["int4", "int2", "ternary", "binary"])
def test_gradients_of_sixteen_bits_are_those_of_their_fp32_numbers(dtype: torch.dtype, format_name: str) -> None:
    rule = Learned(exact(format=format_name, mid_rise=format_name == "int2"))
    x, upper, scale = normal(4, 8).to(dtype), normal(4, 8, seed=1).to(dtype), torch.full((4, 1), 0.3)
    d_x, d_scale = ours(rule, x, upper, scale)
    expected = ours(rule, x.float(), upper.float(), scale)
    assert d_x.dtype == dtype
    assert d_scale.dtype == torch.float32
    assert torch.equal(d_x, expected[0].to(dtype))
    assert torch.equal(d_scale, expected[1])


# torch's kernels


def off_the_band(x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """x with none less than half a step beyond the outermost levels, and none on a kink.

    There torch, which rounds before it compares, calls numbers inside; LSQ clips before it rounds, round(clip(v / s)),
    and calls them outside.
    """
    u = off_the_kinks(x, scale) / scale
    u = torch.where((u > high) & (u < high + 0.6), u + 0.7, u)
    u = torch.where((u < low) & (u > low - 0.6), u - 0.7, u)
    return u * scale


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), full_range=st.booleans(), per_tensor=st.booleans())
def test_lsq_gradients_are_those_of_torch(seed: int, bits: int, full_range: bool, per_tensor: bool) -> None:
    granularity = "per_tensor" if per_tensor else "per_channel"
    spec = exact(format=f"int{bits}", full_range=full_range, granularity=granularity)
    x, upper = normal(6, 32, seed=seed), normal(6, 32, seed=seed + 1)
    scale = scale_for(x, spec, seed)
    x = off_the_band(x, scale, spec.quant_min, spec.quant_max)
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    mine = fake_quantize(leaves[0], Learned(spec), leaves[1])
    mine.backward(upper)
    judge = [x.clone().requires_grad_(), scale.reshape(-1).clone().requires_grad_()]
    sharing = x.numel() if per_tensor else x.shape[1]
    limits = spec.quant_min, spec.quant_max, 1 / math.sqrt(sharing * spec.quant_max)
    zeros = torch.zeros_like(judge[1])
    if per_tensor:
        theirs = torch._fake_quantize_learnable_per_tensor_affine(*judge, zeros, *limits)
    else:
        theirs = torch._fake_quantize_learnable_per_channel_affine(*judge, zeros, 0, *limits)
    theirs.backward(upper)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert judge[1].grad is not None
    assert judge[0].grad is not None
    torch.testing.assert_close(leaves[0].grad, judge[0].grad)
    torch.testing.assert_close(leaves[1].grad.reshape(-1), judge[1].grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_lsq_plus_gradients_are_those_of_torch(seed: int, bits: int) -> None:
    # torch's own parameter is z, ours the offset, the low end: z = quant_min - offset / s, so that
    # d offset = -dz / s and ds = ds|z + dz offset / s^2. The offset is a whole number of steps: z is no rounded one.
    spec = exact(format=f"int{bits}", symmetric=False)
    x, upper = normal(6, 32, seed=seed), normal(6, 32, seed=seed + 1)
    draw = torch.rand(6, 1, generator=torch.Generator().manual_seed(seed))
    scale = (0.5 + draw) * 3 / 2**bits
    zero_point = torch.randint(
        spec.quant_min, spec.quant_max + 1, (6, 1), generator=torch.Generator().manual_seed(seed)
    ).float()
    offset = (spec.quant_min - zero_point) * scale
    x = off_the_band(x, scale, spec.quant_min - zero_point, spec.quant_max - zero_point)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, scale, offset)]
    mine = fake_quantize(leaves[0], Learned(spec), *leaves[1:])
    mine.backward(upper)
    judge = [leaf.clone().requires_grad_() for leaf in (x, scale.reshape(-1), zero_point.reshape(-1))]
    factor = 1 / math.sqrt(32 * spec.quant_max)
    theirs = torch._fake_quantize_learnable_per_channel_affine(*judge, 0, spec.quant_min, spec.quant_max, factor)
    theirs.backward(upper)
    d_x, d_scale, d_z = (leaf.grad for leaf in judge)
    assert d_x is not None
    assert d_scale is not None
    assert d_z is not None
    s, beta = scale.reshape(-1), offset.reshape(-1)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[0].grad, d_x)
    torch.testing.assert_close(leaves[1].grad, (d_scale + d_z * beta / s**2)[:, None], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(leaves[2].grad, (-d_z / s)[:, None], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), symmetric=st.booleans(), full_range=st.booleans())
def test_numbers_are_those_of_torch(seed: int, bits: int, symmetric: bool, full_range: bool) -> None:
    spec = exact(format=f"int{bits}", symmetric=symmetric, full_range=full_range)
    x = normal(6, 32, seed=seed) + 0.2
    scale, zero_point = choose_qparams(x, spec)
    x = moved(x, spec, scale)  # torch multiplies by 1 / s: ties may fall to the other side
    whole = torch.zeros(6, dtype=torch.int32) if zero_point is None else zero_point.reshape(-1).to(torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale.reshape(-1).float(), whole, 0, spec.quant_min, spec.quant_max
    )
    back = dequantize(quantize(x, QParams(scale, zero_point), spec), QParams(scale, zero_point), spec)
    assert torch.equal(back, theirs)


# torchao 0.18.0


@pytest.mark.peer
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "full", "asymmetric"]),
    group_size=st.sampled_from([8, 32]),
)
def test_affine_quantization_is_that_of_torchao(seed: int, bits: int, kind: str, group_size: int) -> None:
    peer = pytest.importorskip("torchao.quantization.quant_primitives", exc_type=ImportError)
    spec = QuantSpec(
        f"int{bits}",
        kind != "asymmetric",
        "per_group",
        group_size,
        convention="compressed-tensors" if kind == "full" else "vllm",
        scale_dtype="fp32",
    )
    x = normal(6, 32, seed=seed) + (0.3 if kind == "asymmetric" else 0.0)
    mapping = peer.MappingType.ASYMMETRIC if kind == "asymmetric" else peer.MappingType.SYMMETRIC
    block, limits = (1, group_size), (spec.quant_min, spec.quant_max)
    scale, zero_point = peer.choose_qparams_affine(
        x, mapping, block, torch.int8, *limits, eps=2.0**-100, scale_dtype=torch.float32, zero_point_dtype=torch.int32
    )
    ours_scale, ours_zero = choose_qparams(x, spec)
    # absmax / ((quant_max - quant_min) / 2): our absmax / 7 for -7 .. 7, compressed-tensors' absmax / 7.5 for -8 .. 7.
    torch.testing.assert_close(ours_scale.reshape(scale.shape), scale, rtol=1e-6, atol=0)
    if ours_zero is not None:
        assert torch.equal(ours_zero.reshape(zero_point.shape).int(), zero_point.int())
    x = moved(x, spec, ours_scale)
    qparams = QParams(scale.reshape(ours_scale.shape), ours_zero)
    codes = quantize(x, qparams, spec)
    theirs = peer.quantize_affine(x, block, scale, zero_point, torch.int8, *limits)
    assert torch.equal(codes, theirs)
    back = peer.dequantize_affine(theirs, block, scale, zero_point, torch.int8, *limits)
    assert torch.equal(dequantize(codes, qparams, spec), back)
    fake = peer._fake_quantize_affine(x, block, scale, zero_point, torch.int32, *limits)
    assert torch.equal(fake_quantize(x, Static(spec), qparams.scale, _offset(qparams, spec)), fake)


def _offset(qparams: QParams, spec: QuantSpec) -> Tensor | None:
    if qparams.zero_point is None:
        return None
    return (spec.quant_min - qparams.zero_point.float().reshape(qparams.scale.shape)) * qparams.scale
