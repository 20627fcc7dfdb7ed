"""RMSNorm whose weight does not train: y = w x r, r = 1 / sqrt(mean(x^2) + eps) (Zhang 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtrain.kernels.room import NO_ROOM, Spare, roomy

try:
    from qtrain.kernels import rms_norm_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    rms_norm_tiles = None  # type: ignore[assignment]


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float, spare: Spare | None = None) -> Tensor:
    """y [.., n] of x [.., n], x r rounded to x's dtype before it is multiplied with w, as Llama does it.

    Saved for the backward: x, and r in fp32. The gradient reaches x alone.

    Args:
        spare: what the readers of y ask for, by whom it is asked for more.
    """
    trains = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    y: Tensor = _FrozenRmsNorm.apply(x, weight, eps, spare if trains else None)  # type: ignore[no-untyped-call]
    return y


def fits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels know these, and nothing else is asked than the gradient of x."""
    if rms_norm_tiles is None or weight is None or weight.requires_grad or weight.dtype != x.dtype:
        return False
    return rms_norm_tiles.fits(x)


class _FrozenRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, spare: Spare | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        room = spare.room if spare else NO_ROOM
        y = roomy(rows, room)
        if _one_pass(rows):
            r = rms_norm_tiles.forward(rows, weight, eps, y)
        else:
            own, r = plain_forward(rows, weight, eps)
            y.copy_(own)
        ctx.save_for_backward(x, weight, r)
        ctx.spare, ctx.room = spare, room
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, r = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, x.shape[-1])
        dx = rms_norm_tiles.backward(rows, weight, r, dy) if _one_pass(rows) else plain_backward(rows, weight, r, dy)
        return dx.view(x.shape), None, None, None


def plain_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, r [rows]) in plain PyTorch."""
    wide = x.to(_at_least_fp32(x))
    r = (wide.square().mean(-1) + eps).rsqrt()
    return (wide * r.unsqueeze(1)).to(x.dtype) * weight, r


def plain_backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
    """dx = r (w dy - x r mean(w dy x r)) in plain PyTorch."""
    kind = _at_least_fp32(x)
    opened, own = dy.to(kind) * weight.to(kind), x.to(kind) * r.unsqueeze(1)
    return ((opened - own * (opened * own).mean(-1, keepdim=True)) * r.unsqueeze(1)).to(x.dtype)


def _one_pass(x: Tensor) -> bool:
    return rms_norm_tiles is not None and rms_norm_tiles.fits(x)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
