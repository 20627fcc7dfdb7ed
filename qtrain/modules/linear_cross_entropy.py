"""Output head and cross-entropy in one pass over chunks of tokens: no [tokens, vocab] ever exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.cross_entropy import cross_entropy_, one_pass, scaled

CHUNK_BYTES = 256 * 2**20
"""Of the logits that exist at once. Below some 1,000 rows a chunk no longer fills a GPU's matrix units."""
CHUNKS_IN_16_BITS = 8
"""At most so many are added up in the weight's own 16 bits, each sum rounded; more are added in fp32."""


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a sum of losses needs nothing from above but one factor: the forward computes it on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows, vocab = hidden.shape[0], weight.shape[0]
        own = weight.to(dtype)
        step = rows_of_a_chunk(vocab, own, trains=needs_weight)
        summed = weight.dtype if rows <= CHUNKS_IN_16_BITS * step else torch.float32
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=summed) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        needs = needs_hidden or needs_weight or needs_bias
        for start in range(0, rows, step):
            x = hidden[start : start + step].to(dtype)
            logits = F.linear(x, own, None if bias is None else bias.to(dtype))
            loss += cross_entropy_(logits, labels[start : start + step], gradient=needs).sum()
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[start : start + step] = logits @ own
            if d_weight is None:
                continue
            if d_weight.dtype == dtype:
                d_weight.addmm_(logits.t(), x)
            else:
                d_weight += logits.t() @ x
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else scaled(d_hidden, grads[0]),
            None if d_weight is None else scaled(d_weight, grads[0]).to(weight_dtype),
            None if d_bias is None else scaled(d_bias, grads[0]).to(bias_dtype),
            None,
            None,
        )


def rows_of_a_chunk(vocab: int, weight: Tensor, *, trains: bool) -> int:
    """Tokens whose logits [rows, vocab] exist at once.

    Beside a weight that trains they may be as large as it: the backward needs that room anyway, to scale its gradient,
    and each chunk reads and writes that gradient once.
    """
    if not one_pass(weight):  # the plain path makes fp32 numbers of them
        return max(1, CHUNK_BYTES // (4 * vocab))
    limit = max(CHUNK_BYTES, weight.nbytes if trains else 0)
    rows = limit // (weight.element_size() * vocab)
    return rows // 128 * 128 or max(1, rows)  # whole tiles of a product


def places_kept(labels: Tensor) -> Tensor:
    """Where labels [...] are not -100: int64 [K], counted row after row."""
    return (labels.reshape(-1) != -100).nonzero().squeeze(-1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, kept: Tensor | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden weight^T + bias)[label], in fp32.

    Args:
        hidden: [..., d], any float dtype; products run in autocast's, else in the weight's.
        weight: [vocab, d] of the output head.
        labels: [...] int64; -100 rows are left out before any product.
        bias: [vocab].
        kept: ``places_kept`` of the labels, if that is known; to look for them is to wait for a GPU.

    Returns:
        A scalar: the summed loss in nats; 0 where every label is -100.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kept = places_kept(labels) if kept is None else kept
    if kept.numel() < labels.numel():
        hidden, labels = hidden[kept], labels[kept]
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, dtype)  # type: ignore[no-untyped-call]
    return loss
