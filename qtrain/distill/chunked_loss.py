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
"""(logits of some rows [n, vocab], which rows) → (loss of each [n], gradient [n, vocab]); it may overwrite the logits,
and the gradient may lie there."""

CHUNK_BYTES = 256 * 2**20
"""One matrix of logits. Of fp32 up to five exist at once, beside products; where a kernel works in place, the student's
and the teacher's alone. Smaller ones leave a GPU's matrix units idle."""


def chunks(rows: int, vocab: int, *, number: int = 4) -> Iterator[slice]:
    """Slices that cover ``rows``, each with at most ``CHUNK_BYTES`` of logits, one row at least.

    Args:
        number: bytes of one logit.
    """
    step = max(1, CHUNK_BYTES // (number * vocab))
    step = step // 128 * 128 or step  # whole tiles of a product
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: RowsLoss, in_place: bool
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        number = weight.element_size() if in_place else wide.itemsize
        for rows in chunks(hidden.shape[0], weight.shape[0], number=number):
            x = hidden[rows].to(weight.dtype)
            losses, gradient = loss(F.linear(x, weight, bias), rows)
            total += losses.sum()
            if d_bias is not None:
                d_bias += gradient.sum(0, dtype=wide)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = gradient @ weight
            if d_weight is not None:
                d_weight += gradient.t() @ x
            del gradient  # before the next chunk's logits
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
            None,
        )


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: RowsLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        needed = ctx.needs_input_grad[0]
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if needed else None
        for rows in chunks(*logits.shape):
            here = logits[rows].clone() if d_logits is None else d_logits[rows].copy_(logits[rows])
            losses, gradient = loss(here, rows)
            total += losses.sum()
            if d_logits is not None and gradient is not here:
                here.copy_(gradient)
        ctx.save_for_backward(d_logits)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, None]:
        (d_logits,) = ctx.saved_tensors
        return (None if d_logits is None else scaled(d_logits, factor)), None


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: RowsLoss, *, in_place: bool = False) -> Tensor:
    """Sum of ``loss`` over the rows of hidden weight^T + bias.

    Args:
        hidden: [N, d].
        weight: [vocab, d], a parameter or a function of parameters (a fake-quantized weight): gradients go to it.
            Products run in ``product_dtype`` of it, as those of the head itself would.
        bias: [vocab].
        in_place: ``loss`` needs no logits in fp32, so that chunks have more rows.
    """
    dtype = product_dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight.to(dtype), None if bias is None else bias.to(dtype), loss, in_place
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
