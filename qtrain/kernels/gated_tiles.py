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

from qtrain.kernels.launch import launch
from qtrain.kernels.quantize_rows import _to
from qtrain.kernels.room import NO_ROOM, Room, roomy

BLOCK = 1024


def fits(x: Tensor) -> bool:
    """Whether the kernels know this tensor."""
    return x.is_cuda and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(gate: Tensor, up: Tensor, room: Room = NO_ROOM) -> Tensor:
    """silu(g) * u, contiguous but for the room beside its rows."""
    gate, up = gate.contiguous(), up.contiguous()
    h = _empty(gate, room)
    grid, size = _grid(gate)
    launch(_forward, grid, gate, up, h, size, size + sum(room), BLOCK=BLOCK)
    return h


def backward(
    gate: Tensor, up: Tensor, gradient: Tensor, room: Room = NO_ROOM, *, opened: bool = True, spent: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dL/dg, dL/du), contiguous but for the room beside the last one's rows; without ``opened`` no h is there."""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    d_gate, d_up = torch.empty_like(gate), gradient if spent else _empty(gate, room)
    h = torch.empty_like(gate) if opened else gate
    grid, size = _grid(gate)
    launch(_backward, grid, gate, up, gradient, h, d_gate, d_up, size, size + sum(room), OPENED=opened, BLOCK=BLOCK)
    return h, d_gate, d_up


def _empty(like: Tensor, room: Room) -> Tensor:
    return torch.empty_like(like) if room == NO_ROOM else roomy(like, room)


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    size = x.shape[-1] if x.dim() else 1
    return (x.numel() // size, triton.cdiv(size, BLOCK)), size


@triton.jit
def _forward(g_ptr, u_ptr, h_ptr, size, h_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, place = column < size, row * size + column
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=there, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * h_stride + column, _to(g * tl.sigmoid(g) * u, h_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g_ptr, u_ptr, dh_ptr, h_ptr, dg_ptr, du_ptr, size, du_stride, OPENED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, place = column < size, row * size + column
    g = tl.load(g_ptr + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=there, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + place, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    opened = g * share
    if OPENED:
        tl.store(h_ptr + place, _to(opened * u, h_ptr.dtype.element_ty), mask=there)
    tl.store(du_ptr + row * du_stride + column, _to(dh * opened, du_ptr.dtype.element_ty), mask=there)
    slope = share * (1.0 + g * (1.0 - share))
    tl.store(dg_ptr + place, _to(dh * u * slope, dg_ptr.dtype.element_ty), mask=there)
