"""bitsandbytes' 4 bits to numbers in one pass over memory: half a byte read and a number written for each.

The Triton twin of ``dequantize_4bit`` (qtrain.kernels.nf4_dequantize), block scales in 8 bits and all; the same bits,
because products and sums are rounded one by one, as they are there. A thread reads a word of eight codes and writes
their numbers side by side, so that reads and writes are whole lines.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import finalize

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor

from qtrain.kernels.launch import Prepared, launch
from qtrain.kernels.quantize_rows import _to

WORDS, WARPS = 512, 4
"""Words of eight codes in a tile, and the warps that share it: four words in each thread, all under way at once."""


class Launch(NamedTuple):
    """Of a kernel.

    Attributes:
        args: not compiled in, the second of them what is written.
        constants: compiled in.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_PLANS: dict[int, dict[Hashable, tuple[tuple[int, ...], Prepared]]] = {}
"""Launches of a weight, and where it lay, as long as its state is there: one has no hash."""


def fits(words: Tensor, state: QuantState, dtype: torch.dtype) -> bool:
    """Whether the kernel knows this weight: whole words of eight codes, contiguous, on a GPU."""
    numbers = math.prod(state.shape)
    whole = numbers > 0 and numbers % 8 == 0 and words.nbytes * 2 == numbers and words.data_ptr() % 4 == 0
    known = words.is_cuda and dtype in (torch.float32, torch.bfloat16, torch.float16)
    nested = not state.nested or state.state2.code.dtype == torch.float32
    return known and whole and nested and words.is_contiguous() and state.blocksize % 8 == 0


def dequantize(words: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W [out, in], in ``out`` if that is given; its rows may lie apart, where ``in`` is a multiple of 8."""
    if out is None:
        out = torch.empty(tuple(state.shape), dtype=dtype, device=words.device)
    launch_first(words, state, _kind(out), out, _launch(words, state, out))
    return out


def again(words: Tensor, state: QuantState, out: Tensor) -> bool:
    """``dequantize`` to ``out`` where this weight was before, to such a place; False, and nothing done, elsewhere."""
    return launch_again(words, state, _kind(out), out)


def _kind(out: Tensor) -> Hashable:
    return "dense", out.dtype, out.shape, out.stride()


def launch_again(words: Tensor, state: QuantState, kind: Hashable, out: Tensor, *others: Tensor) -> bool:
    """Launch what writes to ``out`` if it was launched for this weight before; else False, and nothing is done.

    To look at a weight's eight tensors took the host as long as three launches: seven weights a layer, each way.

    Args:
        kind: all that decides about the launch but the weight. others: that it reads.
    """
    plans = _PLANS.get(id(state))
    found = None if plans is None else plans.get(kind)
    return found is not None and found[0] == _places(words, state, others) and found[1](out)


def launch_first(
    words: Tensor, state: QuantState, kind: Hashable, out: Tensor, planned: Launch, *others: Tensor
) -> None:
    """Launch it, and keep how; tensors that only it holds must be none of its arguments."""
    kernel, grid, args, constants = planned
    launch(kernel, grid, *args, **constants)
    kept = _places(words, state, others), Prepared(kernel, grid, args, 1, **constants)
    if id(state) not in _PLANS:
        _PLANS[id(state)] = {}
        finalize(state, _PLANS.pop, id(state), None)
    _PLANS[id(state)][kind] = kept


def _places(words: Tensor, state: QuantState, others: tuple[Tensor, ...]) -> tuple[int, ...]:
    second = state.state2.absmax.data_ptr() if state.nested else 0
    return words.data_ptr(), state.absmax.data_ptr(), second, *(other.data_ptr() for other in others)


def _launch(words: Tensor, state: QuantState, out: Tensor) -> Launch:
    apart = not out.is_contiguous()
    assert out.stride(-1) == 1 and not (apart and out.shape[-1] % 8)
    count = out.numel() // 8
    second = state.state2 if state.nested else state
    args = (
        words.reshape(-1).view(torch.int32),
        out,
        state.code,
        state.absmax,
        second.code,
        second.absmax,
        state.offset if state.nested else state.code,
        count,
        out.stride(0),
    )
    constants = {
        "A_ROW": out.shape[-1] // 8 if apart else 0,
        "PER_BLOCK": state.blocksize // 8,
        "SECOND": second.blocksize,
        "NESTED": state.nested,
        "WORDS": WORDS,
        "BY_HAND": triton.knobs.runtime.interpret,
        "num_warps": WARPS,
        "enable_fp_fusion": False,  # a fused multiply-add rounds once where bitsandbytes rounds twice
    }
    return Launch(_dequantize, (triton.cdiv(count, WORDS),), args, constants)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    words_ptr,
    out_ptr,
    code_ptr,
    absmax_ptr,
    second_code_ptr,
    second_absmax_ptr,
    offset_ptr,
    count,
    stride,
    A_ROW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = word < count
    bits = tl.load(words_ptr + word, mask=there, other=0)
    block = word // PER_BLOCK
    absmax = tl.load(absmax_ptr + block, mask=there, other=0)
    if NESTED:
        largest = tl.load(second_absmax_ptr + block // SECOND, mask=there, other=0.0)
        absmax = tl.load(second_code_ptr + absmax.to(tl.int32)) * largest + tl.load(offset_ptr)
    number = tl.arange(0, 8)
    # Bytes lie from the lowest up, and in each the first of two codes is the upper half.
    codes = (bits[:, None] >> (4 * (number ^ 1))[None, :]) & 15
    weight = tl.load(code_ptr + codes) * absmax[:, None]
    begin = word * 8 if A_ROW == 0 else word // A_ROW * stride + word % A_ROW * 8
    place = begin[:, None] + number[None, :]
    if BY_HAND:  # a GPU rounds to even in one instruction, the interpreter cuts off
        weight = _to(weight, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=there[:, None])
