"""Rows of logits to their losses and, in place, to the loss's gradient: a read, and a read and a write more.

The Triton twin of ``qtrain.kernels.cross_entropy.plain_``, which takes twelve passes over numbers of four bytes.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to

BLOCK = 8192
"""Logits at a time."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(logits: Tensor) -> bool:
    """Whether the kernel knows these logits."""
    return logits.is_cuda and logits.dtype in DTYPES and logits.numel() > 0 and logits.is_contiguous()


def cross_entropy_(logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """As ``qtrain.kernels.cross_entropy.cross_entropy_``; logits contiguous."""
    assert logits.is_contiguous(), logits.stride()
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    launch(
        _rows,
        (rows,),
        *(logits, target.contiguous(), losses, vocab),
        GRADIENT=gradient,
        STEPS=triton.cdiv(vocab, block),
        BLOCK=block,
        num_warps=max(4, min(16, block // 512)),
    )
    return losses


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor [] in x's dtype; x contiguous."""
    assert x.is_contiguous(), x.stride()
    out = torch.empty_like(x)
    launch(_scaled, (triton.cdiv(x.numel(), BLOCK),), x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def _scaled(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    y = _to(x * tl.load(factor_ptr).to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, y, mask=place < size)


@triton.jit
def _lanes(x, largest, total):  # type: ignore[no-untyped-def]
    """Each lane's largest number so far and its sum of exp(number - largest), with one number more."""
    # A lane without a finite number yet: 0 in place of -inf, for inf - inf is NaN.
    higher = tl.where(x > largest, x, largest)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(largest - base) + tl.exp(x - base)


@triton.jit
def _log_sum(largest, total):  # type: ignore[no-untyped-def]
    """log of the sum over all lanes."""
    top = tl.max(largest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log(tl.sum(total * tl.exp(largest - base), axis=0))


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    logits_ptr, target_ptr, losses_ptr, vocab, GRADIENT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    target = tl.load(target_ptr + row)
    picked = tl.load(logits_ptr + target).to(tl.float32)
    column = tl.arange(0, BLOCK)
    # Largest and sum so far in each lane: one reduction at the end, none in the loop.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        here = step * BLOCK + column
        x = tl.load(logits_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
        largest, total = _lanes(x, largest, total)
    normalizer = _log_sum(largest, total)
    tl.store(losses_ptr + row, normalizer - picked)
    if GRADIENT:
        for step in range(STEPS):
            here = step * BLOCK + column
            x = tl.load(logits_ptr + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
            share = tl.exp(x - normalizer) - tl.where(here == target, 1.0, 0.0)
            tl.store(logits_ptr + here, _to(share, logits_ptr.dtype.element_ty), mask=here < vocab)
