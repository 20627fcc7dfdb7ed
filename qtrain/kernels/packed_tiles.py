"""Packed integers to numbers in one pass, and dY^T X reduced into groups tile by tile, never there whole.

The Triton twins of ``packed_weight`` and of ``_from_weight_gradient`` (qtrain.kernels.packed_linear). Numbers are the
same bits: a code less its zero point, times a scale, is rounded once in fp32 and once to the dtype. Gradients differ by
the order of sums, and by what the twin loses where it rounds G to 16 bits on the way.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.quantize_rows import _to

ROWS, COLUMNS = 8, 512
"""Of a tile of weights that is dequantized."""
OUT_TILE, IN_TILE, TOKEN_TILE = 128, 128, 64
"""Of a tile of G, and tokens that a step of its sum takes. 128 x 128 sums in fp32 fill the registers of 8 warps."""
SPAN = 64
"""Steps that a program takes at most; more tokens are spans of their own."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels know that dtype, and there is something to do where ``tensor`` lies."""
    return tensor.is_cuda and dtype in DTYPES and tensor.numel() > 0


def dequantize(
    words: Tensor,
    bits: int,
    columns: int,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    *,
    mid_rise: bool = False,
) -> Tensor:
    """W [out, columns] = (q - z) s, or (q + 1/2) s.

    Args:
        words: int32 [out, words], as ``qtrain.numerics.packing`` lays codes out.
        scale: [out, groups], as the product sees it.
        zero_point: [out, groups] of any number dtype.
    """
    words, scale = words.contiguous(), scale.to(torch.float32).contiguous()
    out, groups = scale.shape
    weight = torch.empty(out, columns, dtype=dtype, device=words.device)
    grid = (triton.cdiv(out, ROWS), triton.cdiv(columns, COLUMNS))
    _dequantize[grid](
        words,
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        weight,
        out,
        columns,
        words.shape[1],
        groups,
        GROUP=columns // groups,
        BITS=bits,
        ZERO=zero_point is not None,
        HALF=0.5 if mid_rise else 0.0,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return weight


def group_gradients(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    bits: int,
    groups: int,
    zero_point: Tensor | None,
    *,
    mid_rise: bool = False,
    left_out: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """sum_{k in g} G (q - z) and, if asked, sum_{k in g} G: fp32 [out, groups] each, of G = dY^T X [out, in].

    Args:
        dy: [tokens, out]. x: [tokens, in]. words: int32 [out, words].
        zero_point: [out, groups], of any number dtype.
        left_out: bool [out, in], weights that no scale has a part in.
        sums: the second result too.
    """
    dy, x, words = dy.contiguous(), x.contiguous(), words.contiguous()
    (tokens, out), columns = dy.shape, x.shape[1]
    group = columns // groups
    width = min(triton.next_power_of_2(group), IN_TILE)
    chunks = triton.cdiv(group, width)
    together = IN_TILE // width
    spans, steps = _steps(tokens)
    # Parts of a long group, and spans, lie side by side and are added afterwards: in the same order each time.
    leveled = torch.empty(spans * chunks, out, groups, dtype=torch.float32, device=dy.device)
    summed = torch.empty_like(leveled) if sums else None
    grid = (triton.cdiv(out, OUT_TILE), triton.cdiv(groups, together), spans * chunks)
    _group_gradients[grid](
        dy,
        x,
        words,
        leveled if zero_point is None else zero_point.contiguous(),
        words if left_out is None else left_out.contiguous().view(torch.uint8),
        leveled,
        leveled if summed is None else summed,
        tokens,
        out,
        columns,
        words.shape[1],
        groups,
        chunks,
        GROUP=group,
        BITS=bits,
        ZERO=zero_point is not None,
        HALF=0.5 if mid_rise else 0.0,
        LEFT_OUT=left_out is not None,
        SUMS=sums,
        PRECISION="ieee" if dy.dtype == torch.float32 else "tf32",
        OUT_TILE=OUT_TILE,
        TOGETHER=together,
        WIDTH=width,
        TOKEN_TILE=TOKEN_TILE,
        STEPS=steps,
        num_warps=8,
        num_stages=3,
    )
    return leveled.sum(0), None if summed is None else summed.sum(0)


def _steps(tokens: int) -> tuple[int, int]:
    """(spans, steps of each): one of eleven numbers of steps, so that no more kernels are compiled than that.

    A bound that is an argument would do without; under numpy 2.4 Triton's interpreter (3.6) cannot read one.
    """
    steps = triton.cdiv(tokens, TOKEN_TILE)
    spans = triton.cdiv(steps, SPAN)
    each = triton.cdiv(steps, spans)
    return spans, triton.next_power_of_2(each) if each < 8 else 8 * triton.cdiv(each, 8)


@triton.jit
def _codes(words_ptr, row, column, mask, row_words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as fp32 at [row, column]: bits [k b, (k + 1) b) of a row's stream."""
    bit = column * BITS
    word = bit // 32
    start = bit % 32
    place = words_ptr + row.to(tl.int64) * row_words + word
    # Unsigned: a shift to the right would draw the highest bit along.
    codes = tl.load(place, mask=mask, other=0).to(tl.uint32, bitcast=True) >> start.to(tl.uint32)
    if 32 % BITS != 0:
        over = start + BITS > 32
        following = tl.load(place + 1, mask=mask & over, other=0).to(tl.uint32, bitcast=True)
        # Where nothing follows the shift would be by 32 or more, which no machine promises to be 0.
        codes = codes | tl.where(over, following << tl.where(over, 32 - start, 0).to(tl.uint32), 0)
    return (codes & ((1 << BITS) - 1)).to(tl.int32).to(tl.float32) - (1 << (BITS - 1))


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    words_ptr,
    scale_ptr,
    zero_ptr,
    weight_ptr,
    out,
    columns,
    row_words,
    groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < out) & (column < columns)
    levels = _codes(words_ptr, row, column, mask, row_words, BITS)
    own = row.to(tl.int64) * groups + column // GROUP
    if ZERO:
        levels = levels - tl.load(zero_ptr + own, mask=mask, other=0).to(tl.float32)
    weight = (levels + HALF) * tl.load(scale_ptr + own, mask=mask, other=0.0)
    place = row.to(tl.int64) * columns + column
    tl.store(weight_ptr + place, _to(weight, weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_gradients(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    words_ptr,
    zero_ptr,
    left_out_ptr,
    leveled_ptr,
    summed_ptr,
    tokens,
    out,
    columns,
    row_words,
    groups,
    chunks,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    LEFT_OUT: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0) * OUT_TILE + tl.arange(0, OUT_TILE)
    lane = tl.arange(0, TOGETHER * WIDTH)
    part = tl.program_id(2)
    inside = part % chunks * WIDTH + lane % WIDTH  # the group
    first = tl.program_id(1) * TOGETHER
    # Said this way where it is true, so that the compiler sees neighbours and reads whole lines.
    column = first * GROUP + lane if GROUP == WIDTH else (first + lane // WIDTH) * GROUP + inside
    there = (inside < GROUP) & (column < columns)
    gradient = tl.zeros([OUT_TILE, TOGETHER * WIDTH], tl.float32)
    for step in range(STEPS):
        token = (part // chunks * STEPS + step) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
        place = token.to(tl.int64)[:, None]
        known = (token < tokens)[:, None]
        dy = tl.load(dy_ptr + place * out + row[None, :], mask=known & (row < out)[None, :], other=0.0)
        x = tl.load(x_ptr + place * columns + column[None, :], mask=known & there[None, :], other=0.0)
        gradient = tl.dot(tl.trans(dy), x, gradient, input_precision=PRECISION)
    mask = (row < out)[:, None] & there[None, :]
    levels = _codes(words_ptr, row[:, None], column[None, :], mask, row_words, BITS) + HALF
    if ZERO:
        own = row.to(tl.int64)[:, None] * groups + (column // GROUP)[None, :]
        levels = levels - tl.load(zero_ptr + own, mask=mask, other=0).to(tl.float32)
    if LEFT_OUT:
        weight = row.to(tl.int64)[:, None] * columns + column[None, :]
        gradient = tl.where(tl.load(left_out_ptr + weight, mask=mask, other=0) != 0, 0.0, gradient)
    group = first + tl.arange(0, TOGETHER)
    target = (part.to(tl.int64) * out + row.to(tl.int64)[:, None]) * groups + group[None, :]
    kept = (row < out)[:, None] & (group < groups)[None, :]
    # Beyond the group the gradient is 0: its inputs were not loaded.
    leveled = tl.sum(tl.reshape(gradient * levels, [OUT_TILE, TOGETHER, WIDTH]), axis=2)
    tl.store(leveled_ptr + target, leveled, mask=kept)
    if SUMS:
        summed = tl.sum(tl.reshape(gradient, [OUT_TILE, TOGETHER, WIDTH]), axis=2)
        tl.store(summed_ptr + target, summed, mask=kept)
