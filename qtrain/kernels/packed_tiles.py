"""Packed integers to numbers in one pass, and a weight's gradient summed over groups in one more.

The Triton twins of what ``packed_weight`` and ``_from_weight_gradient`` (qtrain.kernels.packed_linear) do after the
words are read, and after the product dY^T X. Numbers are the same bits: a code less its zero point, times a scale, is
rounded once in fp32 and once to the dtype. Sums differ by their order.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to

ROWS, COLUMNS = 8, 512
"""Of a tile of weights whose codes straddle words."""
WORDS, WARPS = 512, 4
"""Of a tile whose codes do not: a thread reads a word and writes its numbers side by side, as ``nf4_tiles`` does."""
SUMMED = 1024
"""Numbers of a tile of the gradient."""
TOKENS, OUTPUTS, SHARE = 32, 128, 512
"""Of a tile of outputs, and how many tokens one program adds up."""
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
    zero = scale if zero_point is None else zero_point.contiguous()
    meaning = {"BITS": bits, "ZERO": zero_point is not None, "HALF": 0.5 if mid_rise else 0.0}
    group = columns // groups
    if 32 % bits == 0 and columns * bits % 32 == 0 and group * bits % 32 == 0:
        count = words.numel()
        launch(
            _dequantize_words,
            (triton.cdiv(count, WORDS),),
            *(words, scale, zero, weight, count),
            GROUP_WORDS=group * bits // 32,
            **meaning,
            WORDS=WORDS,
            num_warps=WARPS,
        )
        return weight
    grid = (triton.cdiv(out, ROWS), triton.cdiv(columns, COLUMNS))
    launch(
        _dequantize,
        grid,
        *(words, scale, zero, weight, out, columns, words.shape[1], groups),
        GROUP=group,
        **meaning,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return weight


def group_sums(
    gradient: Tensor,
    words: Tensor,
    bits: int,
    groups: int,
    zero_point: Tensor | None,
    *,
    mid_rise: bool = False,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """sum_{k in g} G (q - z) and, if asked, sum_{k in g} G: fp32 [out, groups] each.

    Args:
        gradient: G, fp32 [out, in].
        words: int32 [out, words].
        zero_point: [out, groups], of any number dtype.
        sums: the second result too.
    """
    gradient, words = gradient.contiguous(), words.contiguous()
    out, columns = gradient.shape
    leveled = torch.empty(out, groups, dtype=torch.float32, device=gradient.device)
    summed = torch.empty_like(leveled) if sums else None
    group = columns // groups
    width = min(triton.next_power_of_2(group), SUMMED)
    together = SUMMED // width
    launch(
        _group_sums,
        (out, triton.cdiv(groups, together)),
        *(gradient, words, leveled if zero_point is None else zero_point.contiguous(), leveled),
        *(leveled if summed is None else summed, columns, words.shape[1], groups),
        GROUP=group,
        BITS=bits,
        ZERO=zero_point is not None,
        HALF=0.5 if mid_rise else 0.0,
        SUMS=sums,
        TOGETHER=together,
        WIDTH=width,
        num_warps=WARPS,
    )
    return leveled, summed


def output_sums(dy: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """sum_t dY[t, o] (Y[t, o] - b[o]), fp32 [out]: a read of both, where PyTorch's operations take ten passes in fp32.

    Args:
        dy, y: [tokens, out].
    """
    dy, y = dy.contiguous(), y.contiguous()
    tokens, out = dy.shape
    shares = triton.cdiv(tokens, SHARE)
    # Shares are added up afterwards, in an order that is always the same.
    partial = torch.empty(shares, out, dtype=torch.float32, device=dy.device)
    launch(
        _output_sums,
        (triton.cdiv(out, OUTPUTS), shares),
        *(dy, y, y if bias is None else bias.contiguous(), partial, tokens, out),
        BIAS=bias is not None,
        TOKENS=TOKENS,
        OUTPUTS=OUTPUTS,
        STEPS=SHARE // TOKENS,
        num_warps=WARPS,
    )
    return partial.sum(0)


@triton.jit
def _output_sums(  # type: ignore[no-untyped-def]
    dy_ptr,
    y_ptr,
    bias_ptr,
    partial_ptr,
    tokens,
    out,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    wide = column < out
    bias = tl.zeros([OUTPUTS], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)
    total = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        there = (row < tokens)[:, None] & wide[None, :]
        place = row.to(tl.int64)[:, None] * out + column[None, :]
        gradient = tl.load(dy_ptr + place, mask=there, other=0.0).to(tl.float32)
        output = tl.load(y_ptr + place, mask=there, other=0.0).to(tl.float32)
        total += gradient * (output - bias[None, :])
    tl.store(partial_ptr + tl.program_id(1) * out + column, tl.sum(total, axis=0), mask=wide)


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
def _dequantize_words(  # type: ignore[no-untyped-def]
    words_ptr,
    scale_ptr,
    zero_ptr,
    weight_ptr,
    count,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    WORDS: tl.constexpr,
):
    # No row ends inside a word, and no group: words of all rows are one line, and so are groups.
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = word < count
    bits = tl.load(words_ptr + word, mask=there, other=0)
    own = word // GROUP_WORDS
    scale = tl.load(scale_ptr + own, mask=there, other=0.0)
    number = tl.arange(0, 32 // BITS)
    # The bits that a shift of a signed word draws along are masked away.
    codes = (bits[:, None] >> (BITS * number)[None, :]) & ((1 << BITS) - 1)
    levels = codes.to(tl.float32) - (1 << (BITS - 1))
    if ZERO:
        levels = levels - tl.load(zero_ptr + own, mask=there, other=0).to(tl.float32)[:, None]
    weight = (levels + HALF) * scale[:, None]
    place = word[:, None] * (32 // BITS) + number[None, :]
    tl.store(weight_ptr + place, _to(weight, weight_ptr.dtype.element_ty), mask=there[:, None])


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
def _group_sums(  # type: ignore[no-untyped-def]
    gradient_ptr,
    words_ptr,
    zero_ptr,
    leveled_ptr,
    summed_ptr,
    columns,
    row_words,
    groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    SUMS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    known = group < groups
    own = row.to(tl.int64) * groups + group
    zero = tl.zeros([TOGETHER], tl.float32)
    if ZERO:
        zero = tl.load(zero_ptr + own, mask=known, other=0).to(tl.float32)
    leveled = tl.zeros([TOGETHER], tl.float32)
    summed = tl.zeros([TOGETHER], tl.float32)
    for begin in range(0, GROUP, WIDTH):
        inside = begin + tl.arange(0, WIDTH)[None, :]
        there = (inside < GROUP) & known[:, None]
        column = group[:, None] * GROUP + inside
        gradient = tl.load(gradient_ptr + row.to(tl.int64) * columns + column, mask=there, other=0.0)
        levels = _codes(words_ptr, row, column, there, row_words, BITS) + HALF - zero[:, None]
        leveled += tl.sum(gradient * levels, axis=1)
        summed += tl.sum(gradient, axis=1)
    tl.store(leveled_ptr + own, leveled, mask=known)
    if SUMS:
        tl.store(summed_ptr + own, summed, mask=known)
