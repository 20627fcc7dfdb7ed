"""A summed loss of logits, computed over chunks of rows together with its gradient.

The gradient of a sum needs nothing from above but one factor, so the forward computes it on the way, as in
``qtrain.modules.linear_cross_entropy``: neither the logits nor their gradient exist whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qtrain.kernels.cross_entropy import scaled

RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits of some rows [n, vocab], which rows) → (their summed loss, its gradient [n, vocab])."""

CHUNK_BYTES = 256 * 2**20
"""One matrix of fp32 logits; up to five exist at once. Smaller ones leave a GPU's matrix units idle."""


def chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices that cover ``rows``, each with at most ``CHUNK_BYTES`` of fp32 logits, one row at least."""
    step = max(1, CHUNK_BYTES // (4 * vocab))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: RowsLoss) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            x = hidden[rows].to(weight.dtype)
            value, gradient = loss(F.linear(x, weight, bias), rows)
            total += value
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = gradient @ weight
            if d_weight is not None:
                d_weight += gradient.t() @ x
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else scaled(d_hidden, factor),
            None if d_weight is None else (d_weight * factor).to(ctx.dtypes[0]),
            None if d_bias is None else (d_bias * factor).to(ctx.dtypes[1]),
            None,
        )


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: RowsLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        d_logits = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in chunks(*logits.shape):
            value, gradient = loss(logits[rows], rows)
            total += value
            if d_logits is not None:
                d_logits[rows] = gradient
        ctx.save_for_backward(d_logits)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, None]:
        (d_logits,) = ctx.saved_tensors
        return (None if d_logits is None else scaled(d_logits, factor)), None


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: RowsLoss) -> Tensor:
    """Sum of ``loss`` over the rows of hidden weight^T + bias.

    Args:
        hidden: [N, d].
        weight: [vocab, d], a parameter or a function of parameters (a fake-quantized weight): gradients go to it.
            Products run in ``product_dtype`` of it, as those of the head itself would.
        bias: [vocab].
    """
    dtype = product_dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight.to(dtype), None if bias is None else bias.to(dtype), loss
        )
    return total


def product_dtype(weight: Tensor) -> torch.dtype:
    """What ``nn.Linear`` multiplies in here: autocast's dtype where that is on (fp64 stays), else the weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def logits_loss(logits: Tensor, loss: RowsLoss) -> Tensor:
    """Sum of ``loss`` over the rows of logits [N, vocab] that exist whole; so does their gradient, in their dtype."""
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = _LogitsLoss.apply(logits, loss)  # type: ignore[no-untyped-call]
    return total
