"""Distillation losses summed over tokens, from the student's hidden states and head, or from its logits."""

from __future__ import annotations

from torch import Tensor

from qtrain.distill.chunked_loss import head_loss, logits_loss, product_dtype
from qtrain.distill.divergence import Objective
from qtrain.distill.targets import Target, select
from qtrain.kernels.divergence import IGNORED


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    labels: Tensor,
    objective: Objective,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum over unmasked positions of the objective, in nats; the logits hidden weight^T + bias never exist whole.

    Args:
        hidden: [..., d] of the student.
        weight: [vocab, d] as the student's head multiplies it: for a quantized head the fake-quantized weight, to
            which the gradient goes.
        target: the teacher at the same positions.
        labels: [...] int64: the token that follows the position, or -100 for positions to leave out.
        bias: [vocab] of the student's head.

    Returns:
        A scalar; 0 where every label is -100.

    Raises:
        ModelError: the two vocabularies differ.
    """
    kept, wanted = _kept(labels)
    loss = target.loss(objective, kept, wanted, weight.shape[0])
    in_place = target.one_pass(weight.device, product_dtype(weight))
    return head_loss(select(hidden, kept), weight, bias, loss, in_place=in_place)


def logits_divergence(logits: Tensor, target: Target, labels: Tensor, objective: Objective) -> Tensor:
    """The same sum from the student's whole logits [..., vocab], for heads that are more than a product."""
    kept, wanted = _kept(labels)
    return logits_loss(select(logits, kept), target.loss(objective, kept, wanted, logits.shape[-1]))


def _kept(labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The flat positions that carry loss (None: all of them), and their labels."""
    labels = labels.reshape(-1)
    kept = (labels != IGNORED).nonzero().squeeze(-1)
    return (None, labels) if kept.numel() == labels.numel() else (kept, labels[kept])
