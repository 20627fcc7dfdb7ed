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
from qtrain.kernels.quantize_rows import _to

ROWS, WORDS = 32, 16
"""Of a tile: rows, and words of eight codes of each. Turned over, 32 codes lie side by side."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def codes(words: Tensor, state: QuantState, scale: Tensor, dtype: torch.dtype, turn: bool = False) -> Tensor:
    """q float8_e4m3fn [out, in], or [in, out]; ``in`` a multiple of 8 (``nf4_tiles.fits`` the rest).

    Args:
        scale: fp32 of each row of W, [out, 1].
        dtype: in which W is rounded before.
    """
    rows, columns = state.shape
    shape = (columns, rows) if turn else (rows, columns)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=words.device)
    second = state.state2 if state.nested else state
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, 8 * WORDS))
    _fp8_codes[grid](
        words.reshape(-1).view(torch.int32),
        out,
        scale,
        state.code,
        state.absmax,
        second.code,
        second.absmax,
        state.offset if state.nested else state.code,
        rows,
        columns // 8,
        DTYPE=_TYPES[dtype],
        PER_BLOCK=state.blocksize // 8,
        SECOND=second.blocksize,
        NESTED=state.nested,
        TURN=turn,
        ROWS=ROWS,
        WORDS=WORDS,
        BY_HAND=triton.knobs.runtime.interpret,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _fp8_codes(  # type: ignore[no-untyped-def]
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
    DTYPE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = (row < rows)[:, None] & (word < across)[None, :]
    place = row[:, None] * across + word[None, :]
    bits = tl.load(words_ptr + place, mask=there, other=0)
    block = place // PER_BLOCK
    absmax = tl.load(absmax_ptr + block, mask=there, other=0)
    if NESTED:
        largest = tl.load(second_absmax_ptr + block // SECOND, mask=there, other=0.0)
        absmax = tl.load(second_code_ptr + absmax.to(tl.int32)) * largest + tl.load(offset_ptr)
    inverse = tl.math.div_rn(1.0, tl.load(scale_ptr + row, mask=row < rows, other=1.0))
    number = tl.arange(0, 8)
    # Bytes lie from the lowest up, and in each the first of two codes is the upper half.
    weight = tl.load(code_ptr + ((bits[:, :, None] >> (4 * (number ^ 1))[None, None, :]) & 15)) * absmax[:, :, None]
    y = _to(weight, DTYPE).to(tl.float32) * inverse[:, None, None]
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    if BY_HAND:
        y = _e4m3(y)
    q = y.to(tl.float8e4nv)
    column = word[:, None] * 8 + number[None, :]
    if TURN:
        inside = (word < across)[:, None, None] & (row < rows)[None, None, :]
        tl.store(out_ptr + column[:, :, None] * rows + row[None, None, :], tl.permute(q, (1, 2, 0)), mask=inside)
    else:
        tl.store(out_ptr + row[:, None, None] * (8 * across) + column[None, :, :], q, mask=there[:, :, None])
