"""W [out, in] from bitsandbytes' 4 bits, double quantization undone on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor

try:
    from qtrain.kernels import nf4_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    nf4_tiles = None  # type: ignore[assignment]

Dequantize = Callable[[Tensor, QuantState, Tensor], Tensor]


def dequantize_4bit(words: Tensor, state: QuantState, out: Tensor) -> Tensor:
    """W in ``out`` by bitsandbytes' kernels, or in memory of its own where those do not write into any: the result.

    W = code[q] a, a the largest magnitude of a block; of two levels a = code_2[q_2] a_2 + m (Dettmers 2023, arXiv
    2305.14314). In fp32, rounded to ``out``'s dtype, whatever dtype the weight was quantized from.

    Args:
        words: u8, two codes each, the first in the upper half.
        out: [out, in], contiguous.
    """
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset).float()
    arguments = (words, absmax.float(), state.blocksize, state.quant_type, state.shape, out.dtype)
    if out.device.type == "cuda":
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        return out
    result: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
    return result.view(out.shape)


def nf4_dequantize(words: Tensor, state: QuantState, out: Tensor) -> Tensor:
    """The same bits in one pass by Triton (arguments: ``dequantize_4bit``, which also takes what the kernel cannot)."""
    if nf4_tiles is None or not nf4_tiles.fits(words, state, out):
        return dequantize_4bit(words, state, out)
    return nf4_tiles.dequantize(words, state, out)


def choose_dequantize(device: torch.device, *, tiles: bool) -> tuple[Dequantize, str]:
    """The function to use there, and whose it is.

    Args:
        tiles: take the Triton kernel, where there is one.
    """
    if not tiles:
        return dequantize_4bit, "bitsandbytes"
    if nf4_tiles is None or device.type != "cuda":
        return dequantize_4bit, "bitsandbytes (the kernel in Triton needs a GPU)"
    return nf4_dequantize, "a kernel in Triton"
