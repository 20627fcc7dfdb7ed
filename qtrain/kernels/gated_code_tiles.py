"""SwiGLU and the codes of its rows in one pass: two reads and a byte written, where three kernels took five passes.

The Triton twin of ``qtrain.kernels.gated_codes``. What a pass takes is its arithmetic: a root of e and two quotients a
number, which a second look at a row would take twice.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import STORAGE, _clamp, _code, _has_quotient, _quotient, _round, _stored, _to
from qtrain.numerics.affine import SMALLEST_FP32_SCALE, SMALLEST_SCALE
from qtrain.numerics.spec import QuantSpec

LONGEST = 8192
"""Columns of a part: a row of two parts is looked at once, a longer one twice, the second time from a cache."""
BLOCK = 2048
"""Columns at a time where scales are known."""


def fits(gate: Tensor) -> bool:
    """Whether the kernels know this tensor."""
    return gate.is_cuda and gate.numel() > 0 and gate.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(spec: QuantSpec, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, size] of silu(g) u and the fp32 scale of each row."""
    gate, up = gate.contiguous(), up.contiguous()
    rows, size = gate.shape
    q = torch.empty(rows, size, dtype=torch.int8, device=gate.device)
    scales = torch.empty(rows, dtype=torch.float32, device=gate.device)
    parts = _parts(size)
    launch(_forward, (rows,), gate, up, q, scales, size, REST=parts.rest, **_constants(spec, size, parts.first))
    return q, scales


def backward(
    spec: QuantSpec, gate: Tensor, up: Tensor, gradient: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(fq(h), dL/dg, dL/du); fq(h) where a contiguous gradient lay.

    Args:
        scales: what ``forward`` gave: divisors too where they are kept in fp32, else they are found again.
    """
    gate, up, gradient, scales = gate.contiguous(), up.contiguous(), gradient.contiguous(), scales.contiguous()
    rows, size = gate.shape
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    known = spec.scale_dtype == "fp32"
    constants = _constants(spec, size, BLOCK if known else LONGEST)
    parts = int(constants["STEPS"]) if known else 1
    launch(_backward, (rows, parts), gate, up, gradient, d_gate, d_up, scales, size, KNOWN=known, **constants)
    return gradient, d_gate, d_up


class _Parts(NamedTuple):
    """Columns that a row is held in, powers of two: 11008 as 8192 and 4096, where one of 16384 is a third of nothing.

    Attributes:
        rest: of the second part; 0 where there is none, or where a row is longer than two of them.
    """

    first: int
    rest: int


def _parts(size: int) -> _Parts:
    first = min(LONGEST, 1 << (size.bit_length() - 1))
    left = size - first
    if left <= 0:
        return _Parts(first, 0)
    rest = triton.next_power_of_2(left)
    return _Parts(first, rest) if rest <= LONGEST else _Parts(LONGEST, 0)


def _constants(spec: QuantSpec, size: int, longest: int) -> dict[str, float | int | bool]:
    block = min(longest, triton.next_power_of_2(size))
    return {
        "QUANT_MIN": spec.quant_min,
        "QUANT_MAX": spec.quant_max,
        "REACH": spec.reach,
        "SMALLEST": SMALLEST_FP32_SCALE if spec.scale_dtype == "fp32" else SMALLEST_SCALE,
        "STORAGE": STORAGE[spec.scale_dtype],
        "STEPS": triton.cdiv(size, block),
        "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
    }


@triton.jit
def _opened(g, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return _to(g * tl.sigmoid(g), dtype).to(tl.float32)


@triton.jit
def _numbers(g_ptr, u_ptr, column, size):  # type: ignore[no-untyped-def]
    """h, rounded as often as a consumer rounds."""
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    g = tl.load(g_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    return _to(_opened(g, dtype) * u, dtype).to(tl.float32)


@triton.jit
def _scale_of(widest, REACH: tl.constexpr, SMALLEST: tl.constexpr, STORAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's, from the largest magnitudes of its threads; NaN if one of them is."""
    scale = _stored(tl.math.div_rn(tl.max(widest, axis=0), REACH), SMALLEST, STORAGE)
    total = tl.sum(widest, axis=0)  # a maximum over threads would hide a NaN
    return tl.where(total != total, float("nan"), scale)


@triton.jit
def _wider(widest, h):  # type: ignore[no-untyped-def]
    return tl.maximum(widest, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_scale(  # type: ignore[no-untyped-def]
    g_ptr,
    u_ptr,
    size,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STORAGE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    widest = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        widest = _wider(widest, _numbers(g_ptr, u_ptr, step * BLOCK + tl.arange(0, BLOCK), size))
    return _scale_of(widest, REACH, SMALLEST, STORAGE)


@triton.jit
def _levels(h, scale, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    scaled = tl.math.div_rn(h, tl.broadcast_to(scale, [BLOCK]))
    q = _clamp(_round(scaled), QUANT_MIN, QUANT_MAX)
    return tl.where(scaled == scaled, q, 0.0)  # NaN is no integer; the row's scale is NaN


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    h,
    scale,
    inverse,
    q_ptr,
    column,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if _has_quotient(scale):
        q = _code(_quotient(h, scale, inverse), QUANT_MIN, QUANT_MAX).to(tl.int8)
    else:
        q = _levels(h, scale, QUANT_MIN, QUANT_MAX, BLOCK).to(tl.int8)
    tl.store(q_ptr + column, q, mask=column < size)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    g_ptr,
    u_ptr,
    q_ptr,
    scales_ptr,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STORAGE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g_ptr += row * size
    u_ptr += row * size
    q_ptr += row * size
    column = tl.arange(0, BLOCK)
    if REST > 0 or STEPS == 1:
        h = _numbers(g_ptr, u_ptr, column, size)
        scale = _scale_of(_wider(tl.zeros([BLOCK], tl.float32), h), REACH, SMALLEST, STORAGE)
        if REST > 0:
            beyond = BLOCK + tl.arange(0, REST)
            more = _numbers(g_ptr, u_ptr, beyond, size)
            other = _scale_of(_wider(tl.zeros([REST], tl.float32), more), REACH, SMALLEST, STORAGE)
            scale = tl.maximum(scale, other, propagate_nan=tl.PropagateNan.ALL)
        inverse = tl.math.div_rn(1.0, scale)
        _write(h, scale, inverse, q_ptr, column, size, QUANT_MIN, QUANT_MAX, BLOCK)
        if REST > 0:
            _write(more, scale, inverse, q_ptr, beyond, size, QUANT_MIN, QUANT_MAX, REST)
    else:
        scale = _row_scale(g_ptr, u_ptr, size, REACH, SMALLEST, STORAGE, STEPS, BLOCK)
        inverse = tl.math.div_rn(1.0, scale)
        for step in range(STEPS):
            here = step * BLOCK + column
            h = _numbers(g_ptr, u_ptr, here, size)
            _write(h, scale, inverse, q_ptr, here, size, QUANT_MIN, QUANT_MAX, BLOCK)
    if STORAGE != 0:
        scale = _to(scale, g_ptr.dtype.element_ty).to(tl.float32)  # as a consumer of h's dtype reads it
    tl.store(scales_ptr + row, scale)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g_ptr,
    u_ptr,
    dh_ptr,
    dg_ptr,
    du_ptr,
    scales_ptr,
    size,
    KNOWN: tl.constexpr,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STORAGE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    g_ptr += row * size
    u_ptr += row * size
    dh_ptr += row * size
    used = tl.load(scales_ptr + row)
    scale = used
    if not KNOWN:
        scale = _row_scale(g_ptr, u_ptr, size, REACH, SMALLEST, STORAGE, STEPS, BLOCK)
    for step in range(1 if KNOWN else STEPS):  # where they are known, each block has a program of its own
        column = (tl.program_id(1) + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        g = tl.load(g_ptr + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(g)
        opened = _to(g * share, dtype).to(tl.float32)
        h = _to(opened * u, dtype).to(tl.float32)
        level = _levels(h, scale, QUANT_MIN, QUANT_MAX, BLOCK) * used
        tl.store(dh_ptr + column, _to(level, dtype), mask=inside)
        tl.store(du_ptr + row * size + column, _to(dh * opened, dtype), mask=inside)
        slope = share * (1.0 + g * (1.0 - share))
        tl.store(dg_ptr + row * size + column, _to(dh * u * slope, dtype), mask=inside)
