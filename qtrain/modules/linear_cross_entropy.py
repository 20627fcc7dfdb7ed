"""Output head and cross-entropy in one pass over chunks of tokens: no [tokens, vocab] in fp32 ever exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 256 * 2**20
"""fp32 logits that exist at once. Below some 1,000 rows a chunk no longer fills a GPU's matrix units."""


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a sum of losses needs nothing from above but one factor: the forward computes it on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        rows, needs_hidden, needs_weight = hidden.shape[0], ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, rows, step):
            x, target = hidden[start : start + step], labels[start : start + step]
            logits = F.linear(x.to(weight.dtype), weight, bias).float()
            normalizer = logits.logsumexp(-1)
            picked = logits.gather(-1, target[:, None]).squeeze(-1)
            loss += (normalizer - picked).sum()
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            # d loss / d logits = softmax - onehot, in place of the logits
            gradient = logits.sub_(normalizer[:, None]).exp_()
            gradient.scatter_add_(-1, target[:, None], torch.full_like(picked, -1.0)[:, None])
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[start : start + step] = gradient @ weight
            if d_weight is not None:
                d_weight += gradient.t() @ x.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0]
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * factor.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * factor).to(ctx.dtypes[0]),
            None if d_bias is None else (d_bias * factor).to(ctx.dtypes[1]),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum over rows of -log softmax(hidden weight^T + bias)[label], in fp32.

    Args:
        hidden: [..., d], any float dtype; products run in the weight's.
        weight: [vocab, d] of the output head.
        labels: [...] int64; -100 rows are left out before any product.
        bias: [vocab].

    Returns:
        A scalar: the summed loss in nats; 0 where every label is -100.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kept = (labels != -100).nonzero().squeeze(-1)
    if kept.numel() < labels.numel():
        hidden, labels = hidden[kept], labels[kept]
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels)  # type: ignore[no-untyped-call]
    return loss
