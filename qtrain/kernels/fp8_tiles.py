"""Rows to e4m3 and scales in one pass over device memory, or two over a cache.

The Triton twin of ``qtrain.kernels.fp8_product.plain_fp8_rows``; the same codes, because quotients and products are
rounded as IEEE 754 says. A quotient a number, in place of one a row, took as long as the memory.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch

BLOCK = 4096
"""Columns at a time; a longer row is read twice, the second time from a cache: 11008 at once take 1.2 times as long."""


def fp8_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [rows, n] and scales fp32 [rows, 1] of x [rows, n], or of x * factor [n]."""
    x = x.contiguous()
    rows, size = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    launch(
        _fp8_rows,
        (rows,),
        *(x, x if factor is None else factor.contiguous(), codes, scale, size),
        FACTOR=factor is not None,
        STEPS=triton.cdiv(size, block),
        BY_HAND=triton.knobs.runtime.interpret,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )
    return codes, scale


@triton.jit
def _fp8_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    factor_ptr,
    codes_ptr,
    scale_ptr,
    size,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = row.to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    widest = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        x = _numbers(x_ptr + place, factor_ptr, step * BLOCK + lane, size, FACTOR)
        widest = _wider(widest, tl.abs(x))
    largest = tl.reduce(widest, 0, _wider)
    scale = _wider(tl.math.div_rn(largest, 448.0), 2.0**-100)
    tl.store(scale_ptr + row, scale)
    inverse = tl.math.div_rn(1.0, scale)
    for step in range(STEPS):
        column = step * BLOCK + lane
        if STEPS > 1:
            x = _numbers(x_ptr + place, factor_ptr, column, size, FACTOR)
        y = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
        if BY_HAND:
            y = _e4m3(y)
        tl.store(codes_ptr + place + column, y.to(tl.float8e4nv), mask=column < size)


@triton.jit
def _wider(a, b):  # type: ignore[no-untyped-def]
    """The larger one, NaN if one is: a row with one is NaN in all that it is multiplied with."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _e4m3(x):  # type: ignore[no-untyped-def]
    """fp32 numbers of e4m3, ties to even: the interpreter (3.6) loses the carry where a mantissa rounds up to 2."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    # Below 2^-6 steps are 2^-9: the sum with 1.5 * 2^14 leaves no bit for less.
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _e5m2(x):  # type: ignore[no-untyped-def]
    """fp32 numbers of e5m2, ties to even: one bit of mantissa less, and below 2^-14 steps of 2^-16."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFFFF + ((bits >> 21) & 1)) & -2097152
    return tl.where(tl.abs(x) < 2.0**-14, (x + 192.0) - 192.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _numbers(x_ptr, factor_ptr, column, size, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(x_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if FACTOR:
        x = x * tl.load(factor_ptr + column, mask=column < size, other=0.0)
    return x
