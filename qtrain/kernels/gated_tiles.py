"""SwiGLU's h = silu(g) * u and its backward in one pass each: 2 reads and a write, 3 reads and 3 writes.

The Triton twin of ``qtrain.kernels.gated``. Sums of plain PyTorch are 5 and 14 such passes. In 16 bits each result is
rounded once, where plain PyTorch rounds silu(g) too.
"""

# mypy: disallow-untyped-decorators=False, warn-unused-ignores=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain.kernels.quantize_rows import _to

BLOCK = 1024


def fits(x: Tensor) -> bool:
    """Whether the kernels know this tensor."""
    return x.is_cuda and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(g) * u, contiguous."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    _forward[(triton.cdiv(h.numel(), BLOCK),)](gate, up, h, h.numel(), BLOCK=BLOCK)
    return h


def backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dL/dg, dL/du), contiguous."""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    h, d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    grid = (triton.cdiv(h.numel(), BLOCK),)
    _backward[grid](gate, up, gradient, h, d_gate, d_up, h.numel(), BLOCK=BLOCK)
    return h, d_gate, d_up


@triton.jit
def _forward(g_ptr, u_ptr, h_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=there, other=0.0).to(tl.float32)
    tl.store(h_ptr + place, _to(g * tl.sigmoid(g) * u, h_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward(g_ptr, u_ptr, dh_ptr, h_ptr, dg_ptr, du_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=there, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + place, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    opened = g * share
    tl.store(h_ptr + place, _to(opened * u, h_ptr.dtype.element_ty), mask=there)
    tl.store(du_ptr + place, _to(dh * opened, du_ptr.dtype.element_ty), mask=there)
    slope = share * (1.0 + g * (1.0 - share))
    tl.store(dg_ptr + place, _to(dh * u * slope, dg_ptr.dtype.element_ty), mask=there)
