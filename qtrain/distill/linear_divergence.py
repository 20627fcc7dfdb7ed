"""Distillation losses summed over tokens, from the student's hidden states and head, or from its logits."""

from __future__ import annotations

from torch import Tensor

from qtrain.distill.chunked_loss import RowsLoss, head_loss, logits_loss
from qtrain.distill.divergence import Objective, cross_entropy, log_softmax
from qtrain.distill.targets import Target, select

IGNORED = -100
"""The label of a position that carries no loss."""


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
    loss = _objective_loss(objective, target.divergence(objective, kept, weight.shape[0]), wanted)
    return head_loss(select(hidden, kept), weight, bias, loss)


def logits_divergence(logits: Tensor, target: Target, labels: Tensor, objective: Objective) -> Tensor:
    """The same sum from the student's whole logits [..., vocab], for heads that are more than a product."""
    kept, wanted = _kept(labels)
    loss = _objective_loss(objective, target.divergence(objective, kept, logits.shape[-1]), wanted)
    return logits_loss(select(logits, kept), loss)


def _objective_loss(objective: Objective, divergence: RowsLoss, wanted: Tensor) -> RowsLoss:
    """The objective of some of the kept rows, given the student's logits there."""
    temperature, ce_weight = objective.temperature, objective.ce_weight

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        value, gradient = divergence(log_softmax(logits, temperature), rows)
        # d/d logits = (1/T) d/du, times T^2
        value, gradient = value * temperature**2 * (1 - ce_weight), gradient.mul_(temperature * (1 - ce_weight))
        if ce_weight:
            entropy, onward = cross_entropy(logits, wanted[rows])
            value, gradient = value + ce_weight * entropy, gradient.add_(onward, alpha=ce_weight)
        return value, gradient

    return loss


def _kept(labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The flat positions that carry loss (None: all of them), and their labels."""
    labels = labels.reshape(-1)
    kept = (labels != IGNORED).nonzero().squeeze(-1)
    return (None, labels) if kept.numel() == labels.numel() else (kept, labels[kept])
