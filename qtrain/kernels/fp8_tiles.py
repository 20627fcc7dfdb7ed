"""Rows to e4m3 and scales in one pass over device memory, or two over a cache.

The Triton twin of ``qtrain.kernels.fp8_product.plain_fp8_rows``; the same codes, because quotients and products are
rounded as IEEE 754 says. A quotient a number, in place of one a row, took as long as the memory.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch

BLOCK = 4096
"""Columns at a time; a longer row is read twice, the second time from a cache: 11008 at once take 1.2 times as long."""


SOURCES = 3
"""That a kernel reads side by side."""


def fp8_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [rows, n] and scales fp32 [rows, 1] of x [rows, n], or of x * factor [n]."""
    return fp8_rows_beside([x], factor)


def fp8_rows_beside(xs: Sequence[Tensor], factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Those of up to SOURCES x_i [rows, n_i] side by side, n the sum of n_i."""
    xs = [x.contiguous() for x in xs]
    rows, sizes = xs[0].shape[0], [x.shape[1] for x in xs]
    codes = torch.empty(rows, sum(sizes), dtype=torch.float8_e4m3fn, device=xs[0].device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=xs[0].device)
    block = min(BLOCK, triton.next_power_of_2(max(sizes)))
    none = SOURCES - len(xs)
    launch(
        _fp8_rows,
        (rows,),
        *(*xs, *[xs[0]] * none, xs[0] if factor is None else factor.contiguous(), codes, scale, *sizes, *[0] * none),
        COUNT=len(xs),
        FACTOR=factor is not None,
        STEPS=triton.cdiv(max(sizes), block),
        BY_HAND=triton.knobs.runtime.interpret,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )
    return codes, scale


@triton.jit
def _fp8_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    z_ptr,
    factor_ptr,
    codes_ptr,
    scale_ptr,
    x_size,
    y_size,
    z_size,
    COUNT: tl.constexpr,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = row.to(tl.int64)
    x_ptr += place * x_size
    y_ptr += place * y_size
    z_ptr += place * z_size
    codes_ptr += place * (x_size + y_size + z_size)
    lane = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    y = x
    z = x
    widest = x
    for step in range(STEPS):
        column = step * BLOCK + lane
        x = _numbers(x_ptr, factor_ptr, column, x_size, FACTOR)
        widest = _wider(widest, tl.abs(x))
        if COUNT > 1:
            y = _numbers(y_ptr, factor_ptr + x_size, column, y_size, FACTOR)
            widest = _wider(widest, tl.abs(y))
        if COUNT > 2:
            z = _numbers(z_ptr, factor_ptr + x_size + y_size, column, z_size, FACTOR)
            widest = _wider(widest, tl.abs(z))
    largest = tl.reduce(widest, 0, _wider)
    scale = _wider(tl.math.div_rn(largest, 448.0), 2.0**-100)
    tl.store(scale_ptr + row, scale)
    inverse = tl.math.div_rn(1.0, scale)
    for step in range(STEPS):
        column = step * BLOCK + lane
        if STEPS > 1:
            x = _numbers(x_ptr, factor_ptr, column, x_size, FACTOR)
        _write(codes_ptr, x, inverse, column, x_size, BY_HAND)
        if COUNT > 1:
            if STEPS > 1:
                y = _numbers(y_ptr, factor_ptr + x_size, column, y_size, FACTOR)
            _write(codes_ptr + x_size, y, inverse, column, y_size, BY_HAND)
        if COUNT > 2:
            if STEPS > 1:
                z = _numbers(z_ptr, factor_ptr + x_size + y_size, column, z_size, FACTOR)
            _write(codes_ptr + x_size + y_size, z, inverse, column, z_size, BY_HAND)


@triton.jit
def _write(codes_ptr, numbers, inverse, column, size, BY_HAND: tl.constexpr):  # type: ignore[no-untyped-def]
    y = tl.minimum(tl.maximum(numbers * inverse, -448.0), 448.0)
    if BY_HAND:
        y = _e4m3(y)
    tl.store(codes_ptr + column, y.to(tl.float8e4nv), mask=column < size)


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
