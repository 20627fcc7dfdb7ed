"""A step of AdamW in one pass over memory: reads w, g, m, v, and writes w, m, v; 14 bytes a weight in bf16.

The Triton twin of ``qtrain.kernels.adamw.plain_``, with the same random bits.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def fits(x: Tensor) -> bool:
    """Whether the kernel knows this tensor."""
    return x.is_cuda and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: tuple[float, ...],
    keys: tuple[int, int],
    factor: Tensor | None = None,
) -> None:
    """In place, on contiguous tensors.

    Args:
        step: the numbers of an ``AdamWStep``.
        factor: of the gradient, fp32 [] on its device: a pointer, so that the host does not wait for it.
    """
    size = weight.numel()
    # As int32: an argument that does not fit would be another type, and another compilation.
    first, second = (key - 2**32 if key >= 2**31 else key for key in keys)
    _adamw[(triton.cdiv(size, BLOCK),)](
        *(weight, gradient, m, v, m if factor is None else factor, size, *step, first, second),
        FACTOR=factor is not None,
        BLOCK=BLOCK,
    )


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261  # 0x846ca68b as int32
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _rounded(x, noise, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = bits + (noise & 0xFFFF)
        up = tl.where((bits & 0x7FFFFFFF) < 0x7F7F0000, up, bits)
        up = tl.where(x != x, 0x7FC00000, up)
        x = (up & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


# Keys and rates change at each step: specialized for 1 and for multiples of 16 they would be compiled anew.
@triton.jit(do_not_specialize=["first", "second"])
def _adamw(  # type: ignore[no-untyped-def]
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    factor_ptr,
    size,
    kept,
    lr,
    share,
    beta2,
    square_share,
    correction,
    eps,
    first,
    second,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    w = tl.load(w_ptr + place, mask=there, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + place, mask=there, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + place, mask=there, other=0.0).to(tl.float32)
    if FACTOR:
        g = g * tl.load(factor_ptr)
    m = m + (g - m) * share
    v = v * beta2 + g * g * square_share
    spread = tl.math.sqrt_rn(v) * correction + eps
    w = w * kept - tl.math.div_rn(m, spread) * lr
    one = _mix(_mix(place.to(tl.int32) ^ first) + second)
    two = _mix(one + first)
    tl.store(w_ptr + place, _rounded(w, one, w_ptr.dtype.element_ty), mask=there)
    tl.store(m_ptr + place, _rounded(m, one >> 16, m_ptr.dtype.element_ty), mask=there)
    tl.store(v_ptr + place, _rounded(v, two, v_ptr.dtype.element_ty), mask=there)
