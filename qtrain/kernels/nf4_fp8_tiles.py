"""bitsandbytes' 4 bits to e4m3 rows in one pass, as they lie or turned over: half a byte read and one written.

The same codes as ``fp8_rows`` gives of the dequantized weight, whose scales it is given: of a frozen weight they stay.
By way of 16 bits a weight was 3 bytes more written and 3 more read, turned over 5.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor

from qtrain.kernels.fp8_tiles import _e4m3
from qtrain.kernels.nf4_tiles import Launch, launch_again, launch_first
from qtrain.kernels.quantize_rows import _to

WORDS, WARPS = 512, 4
"""Words of eight codes in a tile, one after the other as they lie, and the warps that share it."""
ROWS, ACROSS = 32, 16
"""Of a tile that is turned over: rows, and words of each; 32 codes lie side by side then."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def codes(
    words: Tensor,
    state: QuantState,
    scale: Tensor,
    dtype: torch.dtype,
    turn: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """q float8_e4m3fn [out, in], or [in, out]; ``in`` a multiple of 8 (``nf4_tiles.fits`` the rest).

    Args:
        scale: fp32 of each row of W, [out, 1].
        dtype: in which W is rounded before.
        out: memory for them; those that are turned over may be some columns of wider rows.
    """
    scale, out = scale.contiguous(), _room(scale, state, turn) if out is None else out
    assert out.is_contiguous() or (turn and out.stride(1) == 1), out.stride()
    planned = _launch(words, state, scale, dtype, out, turn)
    launch_first(words, state, ("fp8", dtype, turn, out.stride(0)), out, planned, scale)
    return out


def again(
    words: Tensor, state: QuantState, scale: Tensor, dtype: torch.dtype, turn: bool, out: Tensor | None = None
) -> Tensor | None:
    """``codes`` where this weight had some before, by this scale; None, and nothing done, elsewhere."""
    out = _room(scale, state, turn) if out is None else out
    kind = "fp8", dtype, turn, out.stride(0)
    return out if launch_again(words, state, kind, out, scale.contiguous()) else None


def _room(scale: Tensor, state: QuantState, turn: bool) -> Tensor:
    rows, columns = state.shape
    return scale.new_empty((columns, rows) if turn else (rows, columns), dtype=torch.float8_e4m3fn)


def _launch(words: Tensor, state: QuantState, scale: Tensor, dtype: torch.dtype, out: Tensor, turn: bool) -> Launch:
    rows, columns = state.shape
    second = state.state2 if state.nested else state
    offset = state.offset if state.nested else state.code
    levels = (state.code, state.absmax, second.code, second.absmax)
    known = (words.reshape(-1).view(torch.int32), out, scale, *levels, offset)
    kinds = {
        "DTYPE": _TYPES[dtype],
        "PER_BLOCK": state.blocksize // 8,
        "SECOND": second.blocksize,
        "NESTED": state.nested,
        "BY_HAND": triton.knobs.runtime.interpret,
        "enable_fp_fusion": False,
    }
    if turn:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, 8 * ACROSS))
        tiles = {"ROWS": ROWS, "WORDS": ACROSS, "num_warps": 4}
        return Launch(_turned, grid, (*known, rows, columns // 8, out.stride(0)), kinds | tiles)
    count = rows * columns // 8
    assert count + WORDS < 2**31
    tiles = {"WORDS": WORDS, "num_warps": WARPS}
    return Launch(_as_they_lie, (triton.cdiv(count, WORDS),), (*known, count, columns // 8), kinds | tiles)


@triton.jit
def _absmax(  # type: ignore[no-untyped-def]
    block, there, absmax_ptr, second_code_ptr, second_absmax_ptr, offset_ptr, SECOND: tl.constexpr, NESTED: tl.constexpr
):
    absmax = tl.load(absmax_ptr + block, mask=there, other=0)
    if NESTED:
        largest = tl.load(second_absmax_ptr + block // SECOND, mask=there, other=0.0)
        absmax = tl.load(second_code_ptr + absmax.to(tl.int32)) * largest + tl.load(offset_ptr)
    return absmax


@triton.jit
def _codes(weight, inverse, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):  # type: ignore[no-untyped-def]
    y = _to(weight, DTYPE).to(tl.float32) * inverse
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    if BY_HAND:
        y = _e4m3(y)
    return y.to(tl.float8e4nv)


@triton.jit
def _as_they_lie(  # type: ignore[no-untyped-def]
    words_ptr,
    out_ptr,
    scale_ptr,
    code_ptr,
    absmax_ptr,
    second_code_ptr,
    second_absmax_ptr,
    offset_ptr,
    count,
    across,
    DTYPE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    # A word of each row side by side in one program, as below, took twice as long as by way of 16 bits.
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)  # 32 bits: they are divided by a number of any value
    there = word < count
    bits = tl.load(words_ptr + word, mask=there, other=0)
    absmax = _absmax(
        word // PER_BLOCK, there, absmax_ptr, second_code_ptr, second_absmax_ptr, offset_ptr, SECOND, NESTED
    )
    inverse = tl.math.div_rn(1.0, tl.load(scale_ptr + word // across, mask=there, other=1.0))
    number = tl.arange(0, 8)
    # Bytes lie from the lowest up, and in each the first of two codes is the upper half.
    weight = tl.load(code_ptr + ((bits[:, None] >> (4 * (number ^ 1))[None, :]) & 15)) * absmax[:, None]
    q = _codes(weight, inverse[:, None], DTYPE, BY_HAND)
    tl.store(out_ptr + word.to(tl.int64)[:, None] * 8 + number[None, :], q, mask=there[:, None])


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    words_ptr,
    out_ptr,
    scale_ptr,
    code_ptr,
    absmax_ptr,
    second_code_ptr,
    second_absmax_ptr,
    offset_ptr,
    rows,
    across,
    stride,
    DTYPE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = (row < rows)[:, None] & (word < across)[None, :]
    place = row[:, None] * across + word[None, :]
    bits = tl.load(words_ptr + place, mask=there, other=0)
    absmax = _absmax(
        place // PER_BLOCK, there, absmax_ptr, second_code_ptr, second_absmax_ptr, offset_ptr, SECOND, NESTED
    )
    inverse = tl.math.div_rn(1.0, tl.load(scale_ptr + row, mask=row < rows, other=1.0))
    number = tl.arange(0, 8)
    weight = tl.load(code_ptr + ((bits[:, :, None] >> (4 * (number ^ 1))[None, None, :]) & 15)) * absmax[:, :, None]
    q = _codes(weight, inverse[:, None, None], DTYPE, BY_HAND)
    column = word[:, None] * 8 + number[None, :]
    inside = (word < across)[:, None, None] & (row < rows)[None, None, :]
    tl.store(out_ptr + column[:, :, None] * stride + row[None, None, :], tl.permute(q, (1, 2, 0)), mask=inside)
