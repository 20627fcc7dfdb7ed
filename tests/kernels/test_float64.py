"""Kernels of codes and of frozen weights against float64, on any shape and wherever their inputs lie."""

from __future__ import annotations

import os

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels.fp8_product import LARGEST
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.packing import pack
from qtrain.numerics.rules import Dynamic
from qtrain.numerics.spec import QuantSpec

pytest.importorskip("triton", reason="CPU installs of torch come without triton")

from qtrain.kernels import code_rows, gated_code_tiles, nf4_fp8_tiles, nf4_tiles, packed_tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, in the interpreter
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = 1e-6
"""Of a few operations in fp32."""
SIZES = st.sampled_from([1e-6, 1.0, 1e3])
EXAMPLES = settings(max_examples=25, deadline=None)
# 5000 and 9001 are more than a kernel looks at once.
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([5000, 9001]))
BYTES = Dynamic(QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"))
BY_TOKEN = [BYTES.spec, QuantSpec("int4", granularity="per_token", group_size=None, scale_dtype="fp32")]


def numbers(rows: int, width: int, seed: int, dtype: torch.dtype, size: float = 1.0, apart: bool = False) -> Tensor:
    """[rows, width]; ``apart``: column by column in memory, and every second one."""
    generator = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(rows, width, generator=generator)).to(DEVICE, dtype)
    if not apart:
        return x
    found = torch.full((width, 2 * rows), 7.0, dtype=dtype, device=DEVICE).t()[::2]
    return found.copy_(x)


def a_rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a step of each number in ``dtype``, after two operations in fp32."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2 + 2 * 2.0**-24) * 1.01 + info.tiny * info.eps


def assert_levels(q: Tensor, s: Tensor, exact: Tensor, spec: QuantSpec, within: float = EXACT) -> None:
    """Codes and scales of numbers that are known in float64: s of the largest, q s half a step away at most."""
    largest = exact.abs().amax(1)
    wanted = (largest / spec.reach).clamp(min=2.0**-100)
    assert q.dtype == torch.int8 and bool((q.int().abs() <= spec.quant_max).all())
    assert bool(((s.double() - wanted).abs() <= within * wanted).all())
    assert bool(((q.double() * s.double()[:, None] - exact).abs() <= (0.5 + 130 * within) * wanted[:, None]).all())


@EXAMPLES
@given(
    rows=st.integers(1, 5),
    width=WIDTHS,
    seed=st.integers(0, 99),
    size=SIZES,
    dtype=st.sampled_from(DTYPES),
    spec=st.sampled_from(BY_TOKEN),
    apart=st.booleans(),
    scaled=st.booleans(),
)
def test_codes_of_rows(
    rows: int, width: int, seed: int, size: float, dtype: torch.dtype, spec: QuantSpec, apart: bool, scaled: bool
) -> None:
    x = numbers(rows, width, seed, dtype, size, apart)
    factor = numbers(1, width, seed + 1, torch.float32, apart=apart)[0].abs_().add_(0.1) if scaled else None
    q, s = code_rows.codes(Dynamic(spec), x, None, factor)
    assert_levels(q, s, x.double() if factor is None else x.double() * factor.double(), spec)


@EXAMPLES
@given(
    rows=st.integers(1, 5),
    width=WIDTHS,
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
)
def test_numbers_of_codes(rows: int, width: int, seed: int, dtype: torch.dtype, apart: bool) -> None:
    q = (40 * numbers(rows, width, seed, torch.float32)).clamp(-127, 127).to(torch.int8)
    s = numbers(rows, 1, seed, torch.float32)[:, 0].abs() + 0.01
    exact = q.double() * s.double()[:, None]
    if apart:
        q, s = q.t().contiguous().t(), torch.stack([s, torch.full_like(s, 7.0)], 1).flatten()[::2]
    found = code_rows.numbers(q, s, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    assert bool(((found.double() - exact).abs() <= a_rounding(exact, dtype)).all())
    assert torch.equal(code_rows.turned(q), q.t())


@EXAMPLES
@given(
    rows=st.integers(1, 4),
    width=WIDTHS,
    seed=st.integers(0, 99),
    spec=st.sampled_from(BY_TOKEN),
    apart=st.booleans(),
)
def test_codes_of_swiglu_and_their_backward(rows: int, width: int, seed: int, spec: QuantSpec, apart: bool) -> None:
    """fp32, where silu(g) and h are not rounded on the way."""
    gate, up, upper = (numbers(rows, width, seed + n, torch.float32, 2.0, apart) for n in range(3))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    h = g * torch.sigmoid(g) * u
    q, s = gated_code_tiles.forward(spec, gate, up)
    assert_levels(q, s, h.detach(), spec)
    levels = q.double() * s.double()[:, None]
    wanted = levels, *torch.autograd.grad(h, (g, u), upper.double())
    given = s if not apart else torch.stack([s, torch.full_like(s, 7.0)], 1).flatten()[::2]
    # fq(h) may lie where a contiguous gradient lay.
    found = gated_code_tiles.backward(spec, gate, up, upper if apart else upper.clone(), given)
    for one, other in zip(found, wanted, strict=True):
        scale = s.double()[:, None] * (1e-5 if other is not levels else EXACT) + other.abs() * 1e-5
        assert bool(((one.double() - other).abs() <= scale + 1e-6).all())


def by_definition(words: Tensor, state: QuantState) -> Tensor:
    """W float64: code[q] times the block's largest, which is itself a code times a number, and a mean."""
    absmax = state.absmax.double()
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2).double() + state.offset.double()
    pairs = words.flatten().int()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()
    weight = state.code.double()[codes] * absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return weight.view(state.shape)


@EXAMPLES
@given(
    out=st.integers(1, 9),
    eighths=st.integers(1, 12),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
)
def test_weights_of_four_bits(out: int, eighths: int, seed: int, dtype: torch.dtype, nested: bool, kind: str) -> None:
    weight = numbers(out, 8 * eighths, seed, torch.float32)
    words, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    exact = by_definition(words, state)
    found = nf4_tiles.dequantize(words, state, dtype)
    # Of the largest: a block's own is the sum of a mean and what is left, where digits go.
    bound = a_rounding(exact, dtype) + exact.abs().max() * EXACT / 4
    assert found.dtype == dtype and bool(((found.double() - exact).abs() <= bound).all())
    largest = found.float().abs().amax(1, keepdim=True)
    scale = (largest / LARGEST).clamp(min=2.0**-100)
    for turn in (False, True):
        codes = nf4_fp8_tiles.codes(words, state, scale, dtype, turn)
        q = (codes.t() if turn else codes).double() * scale.double()
        # 3 bits of mantissa: half a step is 2^-4 of a number, and no less than 2^-10 / 448 of the row's largest.
        step = torch.maximum(exact.abs() * 2**-4, largest.double() * 2**-10 / LARGEST) * (1 + 1e-6)
        assert bool(((q - exact).abs() <= step + bound).all())


@EXAMPLES
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    zero=st.sampled_from(["none", "whole", "any", "half"]),
    apart=st.booleans(),
)
def test_weights_of_packed_integers(
    out: int, groups: int, size: int, bits: int, seed: int, dtype: torch.dtype, zero: str, apart: bool
) -> None:
    """W = (q - z) s, or (q + 1/2) s, with words, scales and zero points that lie apart or do not."""
    spec = QuantSpec(f"int{bits}", symmetric=False, group_size=size)
    weight = numbers(out, groups * size, seed, torch.float32) + 0.3
    qparams = choose_qparams(weight, spec)
    codes = quantize(weight, qparams, spec)
    scale, point = qparams.scale.float(), qparams.zero_point
    assert point is not None
    given = {"none": None, "half": None, "whole": point, "any": point.float() + 0.375}[zero]
    shift = 0.5 if zero == "half" else 0.0 if given is None else -given.double().repeat_interleave(size, 1)
    exact = (codes.double() + shift) * scale.double().repeat_interleave(size, 1)
    words = pack(codes, spec.bits)
    if apart:
        words, scale = (torch.stack([one, one + 1], 2)[..., 0] for one in (words, scale))
        given = None if given is None else given.t().contiguous().t()
    found = packed_tiles.dequantize(words, bits, groups * size, scale, given, dtype, mid_rise=zero == "half")
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= a_rounding(exact, dtype)).all())
