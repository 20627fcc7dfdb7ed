"""Rows to int8 or e4m3 codes and scales in one pass over device memory: a read of 2 bytes and a write of 1 where plain
PyTorch takes six passes.

The Triton twin of ``qtrain.kernels.codes.plain_codes``; the same codes, as in ``quantize_rows``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.fp8_tiles import _e4m3
from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import STORAGE, _clamp, _code, _has_quotient, _quotient, _round, _stored, _to
from qtrain.numerics.affine import FLOAT_DTYPES, SMALLEST_FP32_SCALE, SMALLEST_SCALE
from qtrain.numerics.rules import RULES, Rule

BLOCK = 4096
"""Columns at a time; a longer row is read twice, the second time from a cache (11008 at once: no faster)."""
TILE = 64
"""Rows and columns of what is turned over at a time."""


def codes(rule: Rule, x: Tensor, scale: Tensor | None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 or e4m3 [rows, in] and the fp32 scale of each row; of x * factor [in] where that is given."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    rows, size = x.shape
    out = torch.empty_like(x, dtype=FLOAT_DTYPES.get(rule.spec.format, torch.int8))
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch(
        _codes,
        (rows,),
        x,
        out,
        scales,
        x if scale is None else scale.contiguous(),
        x if factor is None else factor.contiguous(),
        size,
        DYNAMIC=scale is None,
        FACTOR=factor is not None,
        **_constants(rule.key, size),
    )
    return out, scales


def numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q s [rows, in] in ``dtype``, rounded once."""
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, size = codes.shape
    out = torch.empty(rows, size, dtype=dtype, device=codes.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    launch(_numbers_of, (rows, triton.cdiv(size, block)), codes, scale, out, size, BLOCK=block, num_warps=4)
    return out


def turned(codes: Tensor) -> Tensor:
    """q^T, contiguous."""
    rows, columns = codes.shape
    out = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    launch(_turned, grid, codes, out, rows, columns, codes.stride(0), codes.stride(1), TILE=TILE, num_warps=4)
    return out


@lru_cache(maxsize=4096)
def _constants(key: str, size: int) -> dict[str, float | int | bool]:
    spec, block = RULES[key].spec, min(BLOCK, triton.next_power_of_2(size))
    return {
        "QUANT_MIN": spec.quant_min,
        "QUANT_MAX": spec.quant_max,
        "REACH": spec.reach,
        "SMALLEST": SMALLEST_FP32_SCALE if spec.scale_dtype == "fp32" else SMALLEST_SCALE,
        "MID_RISE": spec.mid_rise,
        "STORAGE": STORAGE[spec.scale_dtype],
        "FLOAT": spec.is_float,
        "BY_HAND": triton.knobs.runtime.interpret,
        "STEPS": triton.cdiv(size, block),
        "BLOCK": block,
        "num_warps": 8 if block > 2048 else 4,
    }


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scales_ptr,
    scale_ptr,
    factor_ptr,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    MID_RISE: tl.constexpr,
    STORAGE: tl.constexpr,
    FLOAT: tl.constexpr,
    BY_HAND: tl.constexpr,
    DYNAMIC: tl.constexpr,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = row.to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    if DYNAMIC:
        widest = tl.zeros([BLOCK], tl.float32)
        for step in range(STEPS):
            x = _numbers(x_ptr + place, factor_ptr, step * BLOCK + columns, size, FACTOR)
            widest = _wider(widest, tl.abs(x))
        largest = tl.reduce(widest, 0, _wider)
        scale = _stored(tl.math.div_rn(largest, REACH), SMALLEST, STORAGE)
        scale = tl.where(largest != largest, largest, scale)
    else:
        scale = _stored(tl.load(scale_ptr + row).to(tl.float32), SMALLEST, STORAGE)
    quick = _has_quotient(scale)
    inverse = tl.math.div_rn(1.0, scale)
    for step in range(STEPS):
        here = step * BLOCK + columns
        if STEPS > 1 or not DYNAMIC:
            x = _numbers(x_ptr + place, factor_ptr, here, size, FACTOR)
        if FLOAT:
            _write_float(x, scale, inverse, DYNAMIC and quick, out_ptr + place, here, size, QUANT_MAX, BY_HAND, BLOCK)
        elif DYNAMIC and quick:
            _write_finite(x, scale, inverse, out_ptr + place, here, size, QUANT_MIN, QUANT_MAX, MID_RISE)
        else:
            _write(x, scale, out_ptr + place, here, size, QUANT_MIN, QUANT_MAX, MID_RISE, BLOCK)
    if STORAGE != 0:
        scale = _to(scale, x_ptr.dtype.element_ty).to(tl.float32)  # as a consumer of x's dtype reads it
    if MID_RISE:
        scale = scale * 0.5
    tl.store(scales_ptr + row, scale)


@triton.jit
def _numbers_of(codes_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(codes_ptr + row * size + column, mask=column < size).to(tl.float32)
    y = _to(q * tl.load(scale_ptr + row), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + column, y, mask=column < size)


@triton.jit
def _turned(codes_ptr, out_ptr, rows, columns, down, across, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    q = tl.load(codes_ptr + row[:, None] * down + column[None, :] * across, mask=there, other=0)
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(q), mask=tl.trans(there))


@triton.jit
def _wider(a, b):  # type: ignore[no-untyped-def]
    """The larger one, NaN if one is. A sum beside the maximum, to show it, was a second wait of all threads."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _numbers(x_ptr, factor_ptr, columns, size, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(x_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
    if FACTOR:
        x = x * tl.load(factor_ptr + columns, mask=columns < size, other=0.0)
    return x


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    x,
    scale,
    out_ptr,
    columns,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    MID_RISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scaled = tl.math.div_rn(x, tl.broadcast_to(scale, [BLOCK]))
    if MID_RISE:
        scaled -= 0.5
    codes = _clamp(_round(scaled), QUANT_MIN, QUANT_MAX)
    if MID_RISE:
        codes = 2.0 * codes + 1.0  # half-integers as odd integers of half the scale
    codes = tl.where(scaled == scaled, codes, 0.0)  # NaN is no integer; the row's scale is NaN
    tl.store(out_ptr + columns, codes.to(tl.int8), mask=columns < size)


@triton.jit
def _write_finite(  # type: ignore[no-untyped-def]
    x,
    scale,
    inverse,
    out_ptr,
    columns,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    MID_RISE: tl.constexpr,
):
    """``_write`` of a row without NaN, in half as many operations: those, not the memory, are what it takes."""
    codes = _code(_quotient(x, scale, inverse) - (0.5 if MID_RISE else 0.0), QUANT_MIN, QUANT_MAX)
    if MID_RISE:
        codes = 2 * codes + 1
    tl.store(out_ptr + columns, codes.to(tl.int8), mask=columns < size)


@triton.jit
def _write_float(  # type: ignore[no-untyped-def]
    x, scale, inverse, quick, out_ptr, columns, size, LARGEST: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr
):
    """e4m3 of quotients, ``quick`` where they are of finite numbers; NaN stays NaN, which it has a code for."""
    scaled = _quotient(x, scale, inverse) if quick else tl.math.div_rn(x, tl.broadcast_to(scale, [BLOCK]))
    y = tl.where(scaled == scaled, _clamp(scaled, -LARGEST, LARGEST), scaled)
    if BY_HAND:  # the interpreter makes a number of NaN
        q = tl.where(y == y, _e4m3(y).to(tl.float8e4nv).to(tl.int8, bitcast=True), 127)
        q = q.to(tl.int8).to(tl.float8e4nv, bitcast=True)
    else:
        q = y.to(tl.float8e4nv)
    tl.store(out_ptr + columns, q, mask=columns < size)
