"""What a student learns from: a teacher's logits by their factors, whole, or their likeliest tokens alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from qtrain.distill.chunked_loss import RowsLoss, product_dtype
from qtrain.distill.divergence import Objective, log_softmax
from qtrain.distill.top_k import top_k_divergence
from qtrain.errors import ModelError


class Target(ABC):
    """A teacher's distributions at the student's positions."""

    @abstractmethod
    def divergence(self, objective: Objective, kept: Tensor | None, vocab: int) -> RowsLoss:
        """D and its gradient dD/du for some of the kept rows, given the student's log softmax(logits / T) there.

        Args:
            kept: flat positions that carry loss; None: all.
            vocab: of the student.

        Raises:
            ModelError: the teacher's vocabulary is of another size.
        """


@dataclass(frozen=True)
class TeacherHead(Target):
    """Logits hidden weight^T + bias, of which no more exist at a time than are compared.

    Attributes:
        hidden: [..., d_t].
        weight: [vocab, d_t].
        bias: [vocab].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def divergence(self, objective: Objective, kept: Tensor | None, vocab: int) -> RowsLoss:
        """Products run in ``product_dtype`` of the weight."""
        same_vocabulary(vocab, self.weight.shape[0])
        compare, temperature, dtype = objective.divergence, objective.temperature, product_dtype(self.weight)
        hidden, weight = select(self.hidden, kept), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)

        def loss(log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return compare(log_softmax(F.linear(hidden[rows].to(dtype), weight, bias), temperature), log_q)

        return loss


@dataclass(frozen=True)
class TeacherLogits(Target):
    """Whole logits [..., vocab]."""

    logits: Tensor

    def divergence(self, objective: Objective, kept: Tensor | None, vocab: int) -> RowsLoss:
        """Softmaxes are taken of some rows at a time."""
        same_vocabulary(vocab, self.logits.shape[-1])
        compare, temperature, logits = objective.divergence, objective.temperature, select(self.logits, kept)
        return lambda log_q, rows: compare(log_softmax(logits[rows], temperature), log_q)


@dataclass(frozen=True)
class TopK(Target):
    """The likeliest tokens.

    Attributes:
        ids: [..., k] int, all different at a position.
        log_probs: [..., k], of the whole softmax of logits / T; T must be the objective's temperature.
    """

    ids: Tensor
    log_probs: Tensor

    def divergence(self, objective: Objective, kept: Tensor | None, vocab: int) -> RowsLoss:
        """Of the k tokens and one bucket for the others; ids are taken to be the student's."""
        compare, ids, log_probs = objective.divergence, select(self.ids, kept), select(self.log_probs, kept)
        return lambda log_q, rows: top_k_divergence(compare, ids[rows].long(), log_probs[rows], log_q)


def select(tensor: Tensor, kept: Tensor | None) -> Tensor:
    """The kept positions of [..., n] as rows [N, n]; None: all."""
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
