"""The loss of each row of logits, and its gradient in the logits' own memory."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from qtrain.kernels import cross_entropy_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    cross_entropy_tiles = None  # type: ignore[assignment]


def cross_entropy_(logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32 [rows].

    Args:
        logits: [rows, vocab]; with ``gradient`` they become softmax(logits) - onehot(target), rounded to their dtype.
        target: int64 [rows], each a column.
    """
    if one_pass(logits):
        return cross_entropy_tiles.cross_entropy_(logits, target, gradient=gradient)
    return plain_(logits, target, gradient=gradient)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in x's dtype, rounded once: a factor of 16 bits would be an error of 0.2 % by itself.

    Args:
        factor: fp32 [], on x's device, where torch has numbers of two dtypes multiplied one by one.
    """
    if one_pass(x):
        return cross_entropy_tiles.scaled(x, factor)
    return (x * factor.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def one_pass(logits: Tensor) -> bool:
    """Whether the kernel runs for them."""
    return cross_entropy_tiles is not None and cross_entropy_tiles.fits(logits)


def plain_(logits: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
    """``cross_entropy_`` in PyTorch's operations."""
    exact = logits.float()
    normalizer = exact.logsumexp(-1)
    picked = exact.gather(-1, target[:, None]).squeeze(-1)
    if gradient:
        exact.sub_(normalizer[:, None]).exp_().scatter_add_(-1, target[:, None], torch.full_like(picked, -1.0)[:, None])
        if exact is not logits:
            logits.copy_(exact)
    return normalizer - picked
