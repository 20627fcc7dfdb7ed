"""h = f(g) * u, and its backward with h computed again: a gated layer keeps g and u, never h."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.room import NO_ROOM, Room, roomy

try:
    from qtrain.kernels import gated_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    gated_tiles = None  # type: ignore[assignment]

Activation = Callable[[Tensor], Tensor]


def gated(activation: Activation, gate: Tensor, up: Tensor, room: Room = NO_ROOM) -> Tensor:
    """f(g) * u of equal shapes, for any f that looks at one number at a time; ``F.silu`` has a kernel (SwiGLU).

    Args:
        room: beside each row of the result; of two dimensions then.
    """
    if _one_pass(activation, gate):
        return gated_tiles.forward(gate, up, room)
    return _placed(activation(gate).mul(up), room)


def gated_backward(
    activation: Activation,
    gate: Tensor,
    up: Tensor,
    gradient: Tensor,
    room: Room = NO_ROOM,
    *,
    opened: bool = True,
    spent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dL/dg, dL/du) from g, u and dL/dh: h for the gradient of what multiplied it.

    Args:
        room: beside each row of dL/du; of two dimensions then.
        opened: h is wanted; without, what stands in its place is anything, and the kernel writes a third less.
        spent: dL/dh is read by nobody afterwards; the kernel writes dL/du over it. Without room.
    """
    if _one_pass(activation, gate):
        return gated_tiles.backward(gate, up, gradient, room, opened=opened, spent=spent)
    if activation is F.silu:
        share = F.silu(gate)
        d_gate: Tensor = torch.ops.aten.silu_backward(gradient * up, gate)
        return share * up if opened else share, d_gate, _placed(share.mul_(gradient), room)
    with torch.enable_grad():
        g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = activation(g) * u
        d_gate, d_up = torch.autograd.grad(h, (g, u), gradient)
    return h.detach(), d_gate, _placed(d_up, room)


def gated_path(device: torch.device) -> str:
    """Which of the two runs there, in words."""
    return "one pass" if gated_tiles is not None and device.type == "cuda" else "plain"


def _one_pass(activation: Activation, gate: Tensor) -> bool:
    return gated_tiles is not None and activation is F.silu and gated_tiles.fits(gate)


def _placed(x: Tensor, room: Room) -> Tensor:
    return x if room == NO_ROOM else roomy(x, room).copy_(x)
