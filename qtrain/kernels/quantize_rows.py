"""Fake quantization of rows in one pass over memory: a read and a write where plain PyTorch takes about ten.

The Triton twin of ``Rule.forward`` and ``Rule.backward`` (qtrain.numerics.rules) for integer formats and fp8 whose rows
or groups have a scale each; the same codes, because quotients are rounded as IEEE 754 says (``div_rn``) and ties to
even. Levels of fp8 are found by hand, on GPUs that have no such type too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.fp8_tiles import _e4m3, _e5m2
from qtrain.kernels.launch import launch
from qtrain.numerics.affine import SMALLEST_FP32_SCALE, SMALLEST_SCALE, grouped_size
from qtrain.numerics.rules import RULES, Dynamic, Gradients, Learned, Rule, Static
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

TILE = 4096
"""Numbers in a tile; longer rows take one of their own, up to LONGEST."""
LONGEST = 16384
NUMBERS_A_WARP = 1024
"""32 in each thread: a row of 16384 in four warps alone has four times as many, which registers do not hold."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE = {"fp32": 0, "bf16": 1, "fp16": 2}
FLOATS = {"fp8_e4m3": 1, "fp8_e5m2": 2}
"""Which kind of float the codes are; 0: integers."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """All that a launch is told besides its tensors.

    Attributes:
        rows, size: numbers that share a scale, and how many times.
        grid: programs.
        constants: what is compiled in.
    """

    rows: int
    size: int
    grid: tuple[int]
    constants: dict[str, float | int | bool]


def fits(rule: Rule, x: Tensor) -> bool:
    """Whether the kernels know this rule and this tensor."""
    return x.is_cuda and x.dtype in DTYPES and knows(rule.key, x.shape)


def forward(
    rule: Rule, x: Tensor, scale: Tensor | None, offset: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """x on its levels, contiguous; in ``dtype`` they are those of x's dtype, cast."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if isinstance(rule, Dynamic):
        scale = offset = None  # a learned range that lies there is not asked
    planned = _launch(rule.key, x.shape)
    launch(
        _forward,
        planned.grid,
        x,
        out,
        x if scale is None else scale.contiguous(),
        x if offset is None else offset.contiguous(),
        planned.rows,
        planned.size,
        DYNAMIC=scale is None,
        **planned.constants,
    )
    return out


def backward(
    rule: Learned, x: Tensor, scale: Tensor, offset: Tensor | None, gradient: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients of x, of the scale and of the offset; the given one may have another dtype than x."""
    x, gradient = x.contiguous(), gradient.contiguous()
    planned = _launch(rule.key, x.shape)
    low, high = rule.edges()
    d_x = torch.empty_like(x) if needs[0] else None
    learns = needs[1] and not isinstance(rule, Static)
    # The kernel writes a row after the other, however those of the range lie.
    d_scale = _in_line(scale) if learns else None
    d_offset = _in_line(offset) if needs[2] and offset is not None and learns else None
    launch(
        _backward,
        planned.grid,
        x,
        gradient,
        x if d_x is None else d_x,
        scale.contiguous(),
        scale if offset is None else offset.contiguous(),
        scale if d_scale is None else d_scale,
        scale if d_offset is None else d_offset,
        planned.rows,
        planned.size,
        1.0 / math.sqrt(planned.size * rule.spec.quant_max),
        low,
        high,
        D_X=d_x is not None,
        D_SCALE=d_scale is not None,
        D_OFFSET=d_offset is not None,
        **planned.constants,
    )
    return Gradients(d_x, d_scale, d_offset)


def _in_line(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


# Found anew for each launch these took longer than Triton's own work on the host (22 of 75 us).
@lru_cache(maxsize=4096)
def _launch(key: str, shape: tuple[int, ...]) -> Launch:
    spec = RULES[key].spec
    size = _sharing(shape, spec)
    rows = math.prod(shape) // size
    columns = 1 << (size - 1).bit_length()
    per_tile = max(1, TILE // columns)
    warps = min(16, max(4, per_tile * columns // NUMBERS_A_WARP))
    tiles: dict[str, float | int | bool] = {"ROWS": per_tile, "COLUMNS": columns, "num_warps": warps}
    return Launch(rows, size, (-(-rows // per_tile),), tiles | _constants(spec))


@lru_cache(maxsize=4096)
def knows(key: str, shape: tuple[int, ...]) -> bool:
    """Whether the kernels have that rule, for tensors of that shape."""
    rule = RULES[key]
    known = rule.spec.format in INTEGER_BITS or rule.spec.is_float
    if type(rule) not in (Dynamic, Learned, Static) or not known or not math.prod(shape):
        return False
    if rule.spec.convention == "torchao":  # a product with 1 / s, where the kernels divide
        return False
    rows = rule.spec.granularity in ("per_channel", "per_token", "per_group")
    return rows and _sharing(shape, rule.spec) <= LONGEST


def _sharing(shape: tuple[int, ...], spec: QuantSpec) -> int:
    return grouped_size(torch.empty(shape, device="meta"), spec)


def _constants(spec: QuantSpec) -> dict[str, float | int | bool]:
    return {
        "QUANT_MIN": spec.quant_min,
        "QUANT_MAX": spec.quant_max,
        "REACH": spec.reach,
        "SMALLEST": SMALLEST_FP32_SCALE if spec.scale_dtype == "fp32" else SMALLEST_SCALE,
        "SYMMETRIC": spec.symmetric,
        "HALF": 0.5 if spec.mid_rise else 0.0,
        "STORAGE": STORAGE[spec.scale_dtype],
        "FLOAT": FLOATS.get(spec.format, 0),
    }


@triton.jit
def _to(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 to ``dtype``, ties to even: the interpreter cuts off what bf16 has no room for."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _stored(scale, SMALLEST: tl.constexpr, STORAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    scale = tl.maximum(scale, SMALLEST)
    if STORAGE == 1:
        scale = _to(scale, tl.bfloat16).to(tl.float32)
    if STORAGE == 2:
        scale = scale.to(tl.float16).to(tl.float32)
    return scale


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    # Ties to even by the rounding of the sum: 1.5 * 2^23 leaves no bit for a fraction. Far numbers clamp anyway.
    x = tl.minimum(tl.maximum(x, -100000.0), 100000.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fma(a, b, c):  # type: ignore[no-untyped-def]
    """a b + c, rounded once; the interpreter has none, and fp64 is exact enough for it."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _quotient(x, scale, inverse):  # type: ignore[no-untyped-def]
    """x / scale as ``div_rn`` rounds it, in three operations where that takes ten and a root table's look-up.

    ``inverse`` is 1 / scale so rounded (Markstein 1990, doi 10.1147/rd.341.0111). For which scales: ``_has_quotient``.
    """
    quotient = x * inverse
    return _fma(_fma(-quotient, scale, x), inverse, quotient)


@triton.jit
def _has_quotient(scale):  # type: ignore[no-untyped-def]
    """Whether ``_quotient`` holds: a mantissa of ones has too coarse an inverse, an extreme scale no exact rest."""
    usual = (scale > 2.0**-78) & (scale < 2.0**126)  # not so NaN
    return usual & ((scale.to(tl.int32, bitcast=True) & 0x7FFFFF) != 0x7FFFFF)


@triton.jit
def _code(scaled, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ties to even, clamped, of numbers that are none but finite: its lowest byte is the code, and no conversion."""
    return (_clamp(scaled, QUANT_MIN, QUANT_MAX) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _level(scaled, zero, HALF: tl.constexpr, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of quotients, as fp32."""
    if FLOAT == 1:
        return _e4m3(_clamp(scaled, QUANT_MIN, QUANT_MAX))
    if FLOAT == 2:
        return _e5m2(_clamp(scaled, QUANT_MIN, QUANT_MAX))
    return _clamp(_round(scaled - HALF) + zero, QUANT_MIN, QUANT_MAX)


@triton.jit
def _wanted_zero_point(low, scale, QUANT_MIN: tl.constexpr):  # type: ignore[no-untyped-def]
    return _round(tl.math.div_rn(-low, scale)) + QUANT_MIN


@triton.jit
def _clamp(codes, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(codes, QUANT_MIN), QUANT_MAX)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scale_ptr,
    offset_ptr,
    rows,
    size,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    STORAGE: tl.constexpr,
    FLOAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    place = row[:, None] * size + column[None, :]
    mask = there[:, None] & (column < size)[None, :]
    stored = tl.load(x_ptr + place, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    if DYNAMIC:
        if SYMMETRIC:
            widest = tl.max(tl.abs(x), axis=1)
            scale = _stored(tl.math.div_rn(widest, tl.full([ROWS], REACH, tl.float32)), SMALLEST, STORAGE)
        else:
            low = tl.minimum(tl.min(x, axis=1), 0.0)
            high = tl.maximum(tl.max(x, axis=1), 0.0)
            steps = tl.full([ROWS], QUANT_MAX - QUANT_MIN, tl.float32)
            scale = _stored(tl.math.div_rn(high - low, steps), SMALLEST, STORAGE)
            zero = _clamp(_wanted_zero_point(low, scale, QUANT_MIN), QUANT_MIN, QUANT_MAX)
    else:
        scale = _stored(tl.load(scale_ptr + row, mask=there, other=1.0).to(tl.float32), SMALLEST, STORAGE)
        if not SYMMETRIC:
            low = tl.load(offset_ptr + row, mask=there, other=0.0).to(tl.float32)
            zero = _clamp(_wanted_zero_point(low, scale, QUANT_MIN), QUANT_MIN, QUANT_MAX)
    scaled = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], [ROWS, COLUMNS]))
    codes = _level(scaled, zero[:, None], HALF, QUANT_MIN, QUANT_MAX, FLOAT)
    if STORAGE != 0:
        scale = _to(scale, stored.dtype).to(tl.float32)
    numbers = (codes - zero[:, None] + HALF) * scale[:, None]
    numbers = tl.where(scaled != scaled, scaled, numbers)  # min and max would hide a NaN
    numbers = _to(numbers, stored.dtype)
    tl.store(out_ptr + place, _to(numbers.to(tl.float32), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x_ptr,
    gradient_ptr,
    d_x_ptr,
    scale_ptr,
    offset_ptr,
    d_scale_ptr,
    d_offset_ptr,
    rows,
    size,
    factor,
    low_edge,
    high_edge,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    REACH: tl.constexpr,
    SMALLEST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    STORAGE: tl.constexpr,
    FLOAT: tl.constexpr,
    D_X: tl.constexpr,
    D_SCALE: tl.constexpr,
    D_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    place = row[:, None] * size + column[None, :]
    mask = there[:, None] & (column < size)[None, :]
    stored = tl.load(x_ptr + place, mask=mask, other=0.0)
    upper = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32)
    scale = _stored(tl.load(scale_ptr + row, mask=there, other=1.0).to(tl.float32), SMALLEST, STORAGE)
    zero = tl.zeros([ROWS], tl.float32)
    moved = tl.zeros([ROWS], tl.float32)
    if not SYMMETRIC:
        low = tl.load(offset_ptr + row, mask=there, other=0.0).to(tl.float32)
        wanted = _wanted_zero_point(low, scale, QUANT_MIN)
        zero = _clamp(wanted, QUANT_MIN, QUANT_MAX)
        free = tl.where(wanted == zero, 1.0, 0.0)
        moved = tl.math.div_rn(low, scale) * free
    u = tl.math.div_rn(stored.to(tl.float32), tl.broadcast_to(scale[:, None], [ROWS, COLUMNS]))
    inside = (u >= low_edge - zero[:, None]) & (u <= high_edge - zero[:, None])
    if D_X:
        tl.store(d_x_ptr + place, tl.where(inside, upper, 0.0).to(stored.dtype), mask=mask)
    if D_SCALE:
        codes = _level(u, zero[:, None], HALF, QUANT_MIN, QUANT_MAX, FLOAT)
        levels = codes - zero[:, None] + HALF
        levels = tl.where(inside, levels - u, levels - moved[:, None])
        pushed = tl.sum(tl.where(mask, levels * upper, 0.0), axis=1) * factor
        tl.store(d_scale_ptr + row, pushed.to(d_scale_ptr.dtype.element_ty), mask=there)
    if D_OFFSET:
        outside = tl.sum(tl.where(mask & (inside == 0), upper, 0.0), axis=1) * factor * free
        tl.store(d_offset_ptr + row, outside.to(d_offset_ptr.dtype.element_ty), mask=there)
