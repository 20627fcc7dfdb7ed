"""W [out, in] from bitsandbytes' 4 bits, double quantization undone on the way."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor

from qtrain.kernels.fp8_product import has_fp8

try:
    from qtrain.kernels import nf4_fp8_tiles, nf4_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    nf4_tiles = nf4_fp8_tiles = None  # type: ignore[assignment]


class Dequantize(Protocol):
    """``dequantize_4bit`` or its twin."""

    def __call__(self, words: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor: ...


def dequantize_4bit(words: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W [out, in] by bitsandbytes' kernels.

    W = code[q] a, a the largest magnitude of a block; of two levels a = code_2[q_2] a_2 + m (Dettmers 2023, arXiv
    2305.14314). In fp32, rounded to ``dtype``, whatever dtype the weight was quantized from.

    Args:
        words: u8, two codes each, the first in the upper half.
        dtype: fp32, bf16 or fp16.
        out: memory for the result, contiguous and of that dtype; on a GPU only.
    """
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset).float()
    shape = tuple(state.shape)
    if begins_blocks_anew(words, state):
        count = math.prod(shape)
        shape = (count // state.blocksize, state.blocksize) if count % state.blocksize == 0 else (1, count)
    arguments = (words, absmax.float(), state.blocksize, state.quant_type, shape, dtype)
    if out is not None:
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        return out
    result: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
    return result.view(state.shape)


def begins_blocks_anew(words: Tensor, state: QuantState) -> bool:
    """Whether bitsandbytes' kernel would take each row to begin with a block, where blocks go on in the next one.

    So it reads rows of 48, 96 or 160 numbers on a CPU (0.50), which it did not store so; on a GPU it does not.
    """
    return words.device.type == "cpu" and state.shape[-1] % state.blocksize != 0


def nf4_dequantize(words: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The same bits in one pass by Triton (arguments: ``dequantize_4bit``, which also takes what the kernel cannot)."""
    if nf4_tiles is not None and out is not None and out.dtype == dtype and nf4_tiles.again(words, state, out):
        return out
    if nf4_tiles is None or not nf4_tiles.fits(words, state, dtype):
        return dequantize_4bit(words, state, dtype, out)
    return nf4_tiles.dequantize(words, state, dtype, out)


def writes_apart(words: Tensor, state: QuantState, dtype: torch.dtype) -> bool:
    """Whether ``nf4_dequantize`` takes an ``out`` whose rows lie apart, each on 16 bytes."""
    return nf4_tiles is not None and nf4_tiles.fits(words, state, dtype) and state.shape[-1] % 8 == 0


def nf4_fp8_codes(
    words: Tensor,
    state: QuantState,
    scale: Tensor,
    dtype: torch.dtype,
    turn: bool = False,
    out: Tensor | None = None,
) -> Tensor | None:
    """What ``fp8_rows`` makes of W in ``dtype``, of known scales [out, 1], in one pass; None where no kernel is.

    Args:
        turn: [in, out] in place of [out, in].
        out: memory for them; those that are turned over may be some columns of wider rows.
    """
    if nf4_tiles is None:
        return None
    if (found := nf4_fp8_tiles.again(words, state, scale, dtype, turn, out)) is not None:
        return found
    fits = nf4_tiles.fits(words, state, dtype) and state.shape[-1] % 8 == 0
    known = fits and has_fp8(words.device)
    return nf4_fp8_tiles.codes(words, state, scale, dtype, turn, out) if known else None


def choose_dequantize(device: torch.device) -> tuple[Dequantize, str]:
    """The function to use there, and whose it is.

    On an H200 the kernel in Triton takes 0.54 to 0.56 of bitsandbytes' time, a copy of as many bytes 0.54 to 0.61.
    """
    if nf4_tiles is None or device.type != "cuda":
        return dequantize_4bit, "bitsandbytes (the kernel in Triton needs a GPU)"
    return nf4_dequantize, "a kernel in Triton"
