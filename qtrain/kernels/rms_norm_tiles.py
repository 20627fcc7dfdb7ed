"""RMSNorm and its backward, a row a program: a read and a write, two reads and a write.

The Triton twin of ``qtrain.kernels.rms_norm``. liger-kernel's backward, which sums up the weight's gradient too, takes
twice the memory's time for 8192 x 4096 numbers (91 us on an H200).
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to

LONGEST = 16384
"""Columns: a row stays in registers."""


def fits(x: Tensor) -> bool:
    """Whether the kernels know this tensor [.., n]."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and known and x.numel() > 0 and x.shape[-1] <= LONGEST


def forward(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """r fp32 [rows]; y [rows, n] is written, its rows may lie apart."""
    assert y.stride(1) == 1
    x, weight = x.contiguous(), weight.contiguous()
    r = torch.empty(len(x), dtype=torch.float32, device=x.device)
    launch(_forward, (len(x),), x, weight, y, r, x.shape[1], y.stride(0), eps, **_constants(x.shape[1]))
    return r


def backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
    """dx [rows, n]."""
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    launch(_backward, (len(x),), x, weight, r, dy, dx, x.shape[1], **_constants(x.shape[1]))
    return dx


def _constants(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _forward(x_ptr, w_ptr, y_ptr, r_ptr, size, y_stride, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < size
    x = tl.load(x_ptr + row * size + column, mask=there, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=there, other=0.0).to(tl.float32)
    r = tl.math.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(r_ptr + row, r)
    own = _to(x * r, y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * y_stride + column, _to(own * w, y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < size
    x = tl.load(x_ptr + row * size + column, mask=there, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * size + column, mask=there, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=there, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row)
    own, opened = x * r, dy * w
    shared = tl.sum(own * opened, axis=0) / size
    tl.store(dx_ptr + row * size + column, _to((opened - own * shared) * r, dx_ptr.dtype.element_ty), mask=there)
