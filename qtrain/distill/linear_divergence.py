"""Distillation losses summed over tokens: from hidden states and heads, or from logits; whole or top-k teachers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from qtrain.distill.chunked_loss import RowsLoss, head_loss, logits_loss, product_dtype
from qtrain.distill.divergence import Objective, cross_entropy, log_softmax
from qtrain.distill.top_k import top_k_divergence
from qtrain.errors import ModelError

IGNORED = -100
"""The label of a position that carries no loss."""


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's logits by their factors, hidden weight^T + bias.

    Attributes:
        hidden: [..., d_t], the positions of the student's.
        weight: [vocab, d_t].
        bias: [vocab].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at each position.

    Attributes:
        ids: [..., k] int, all different at a position.
        log_probs: [..., k], of the whole softmax of logits / T; T must be the objective's temperature.
    """

    ids: Tensor
    log_probs: Tensor


Target = TeacherHead | TopK | Tensor
"""What to learn from: factors of the logits, top-k log-probabilities, or logits [..., vocab]."""


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Target,
    labels: Tensor,
    objective: Objective,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum over unmasked positions of the objective, in nats; the logits hidden weight^T + bias never exist whole.

    Args:
        hidden: [..., d] of the student.
        weight: [vocab, d] as the student's head multiplies it: for a quantized head the fake-quantized weight, to
            which the gradient goes.
        labels: [...] int64: the token that follows the position, or -100 for positions to leave out.
        bias: [vocab] of the student's head.

    Returns:
        A scalar; 0 where every label is -100.

    Raises:
        ModelError: the two vocabularies differ.
    """
    kept, target = _kept(labels)
    rows = _rows(hidden, kept)
    return head_loss(rows, weight, bias, _objective_rows(objective, teacher, kept, target, weight.shape[0]))


def logits_divergence(logits: Tensor, teacher: Target, labels: Tensor, objective: Objective) -> Tensor:
    """The same sum from the student's whole logits [..., vocab], for heads that are more than a product."""
    kept, target = _kept(labels)
    rows = _rows(logits, kept)
    return logits_loss(rows, _objective_rows(objective, teacher, kept, target, logits.shape[-1]))


def _objective_rows(objective: Objective, teacher: Target, kept: Tensor | None, target: Tensor, vocab: int) -> RowsLoss:
    """The objective of some of the kept rows, given the student's logits there."""
    against = _against(objective, teacher, kept, vocab)
    temperature, ce_weight = objective.temperature, objective.ce_weight

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        value, gradient = against(log_softmax(logits, temperature), rows)
        # d/d logits = (1/T) d/du, times T^2
        value, gradient = value * temperature**2 * (1 - ce_weight), gradient.mul_(temperature * (1 - ce_weight))
        if ce_weight:
            entropy, onward = cross_entropy(logits, target[rows])
            value, gradient = value + ce_weight * entropy, gradient.add_(onward, alpha=ce_weight)
        return value, gradient

    return loss


def _against(objective: Objective, teacher: Target, kept: Tensor | None, vocab: int) -> RowsLoss:
    """The divergence of some of the kept rows and its gradient, given the student's log-probabilities there."""
    divergence, temperature = objective.divergence, objective.temperature
    if isinstance(teacher, TopK):
        ids, log_probs = _rows(teacher.ids, kept).long(), _rows(teacher.log_probs, kept)
        return lambda log_q, rows: top_k_divergence(divergence, ids[rows], log_probs[rows], log_q)
    if isinstance(teacher, Tensor):
        same_vocabulary(vocab, teacher.shape[-1])
        whole = _rows(teacher, kept)
        return lambda log_q, rows: divergence(log_softmax(whole[rows], temperature), log_q)
    same_vocabulary(vocab, teacher.weight.shape[0])
    dtype = product_dtype(teacher.weight)
    hidden, weight = _rows(teacher.hidden, kept), teacher.weight.to(dtype)
    bias = None if teacher.bias is None else teacher.bias.to(dtype)
    return lambda log_q, rows: divergence(
        log_softmax(F.linear(hidden[rows].to(dtype), weight, bias), temperature), log_q
    )


def _kept(labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The flat positions that carry loss (None: all of them), and their labels."""
    labels = labels.reshape(-1)
    kept = (labels != IGNORED).nonzero().squeeze(-1)
    return (None, labels) if kept.numel() == labels.numel() else (kept, labels[kept])


def _rows(tensor: Tensor, kept: Tensor | None) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if kept is None else rows[kept]


def same_vocabulary(student: int, teacher: int) -> None:
    """Refuse heads of different sizes.

    Raises:
        ModelError: what each gives.
    """
    if student != teacher:
        raise ModelError(
            f"the student's head gives {student} logits, the teacher's {teacher}",
            rule="distillation compares distributions over the same vocabulary",
            fix="a teacher with the student's tokenizer, and embeddings of one size (resize or pad neither or both)",
        )
