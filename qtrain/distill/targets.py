"""What a student learns from: a teacher's logits by their factors, whole, or their likeliest tokens alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.distill.chunked_loss import RowsLoss, product_dtype
from qtrain.distill.divergence import Objective
from qtrain.distill.top_k import top_k_divergence
from qtrain.errors import ModelError
from qtrain.kernels.divergence import divergence_, one_pass, weighed


class Target(ABC):
    """A teacher's distributions at the student's positions."""

    @abstractmethod
    def loss(self, objective: Objective, kept: Tensor | None, wanted: Tensor, vocab: int) -> RowsLoss:
        """The objective and its gradient for some of the kept rows, given the student's logits there.

        Args:
            kept: flat positions that carry loss; None: all.
            wanted: int64 [N], the kept rows' labels.
            vocab: of the student.

        Raises:
            ModelError: the teacher's vocabulary is of another size.
        """

    def one_pass(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether one kernel computes it over a student's logits of that dtype, in their memory."""
        return False


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

    def loss(self, objective: Objective, kept: Tensor | None, wanted: Tensor, vocab: int) -> RowsLoss:
        """Products run in ``product_dtype`` of the weight."""
        same_vocabulary(vocab, self.weight.shape[0])
        dtype, fields = product_dtype(self.weight), asdict(objective)
        hidden, weight = select(self.hidden, kept), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)

        def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return divergence_(logits, F.linear(hidden[rows].to(dtype), weight, bias), wanted[rows], **fields)

        return loss

    def one_pass(self, device: torch.device, dtype: torch.dtype) -> bool:
        """With Triton on a GPU."""
        return one_pass(device, dtype, product_dtype(self.weight))


@dataclass(frozen=True)
class TeacherLogits(Target):
    """Whole logits [..., vocab]."""

    logits: Tensor

    def loss(self, objective: Objective, kept: Tensor | None, wanted: Tensor, vocab: int) -> RowsLoss:
        """Softmaxes are taken of some rows at a time."""
        same_vocabulary(vocab, self.logits.shape[-1])
        logits, fields = select(self.logits, kept), asdict(objective)
        return lambda own, rows: divergence_(own, logits[rows], wanted[rows], **fields)

    def one_pass(self, device: torch.device, dtype: torch.dtype) -> bool:
        """With Triton on a GPU."""
        return one_pass(device, dtype, self.logits.dtype)


@dataclass(frozen=True)
class TopK(Target):
    """The likeliest tokens.

    Attributes:
        ids: [..., k] int, all different at a position.
        log_probs: [..., k], of the whole softmax of logits / T; T must be the objective's temperature.
    """

    ids: Tensor
    log_probs: Tensor

    def loss(self, objective: Objective, kept: Tensor | None, wanted: Tensor, vocab: int) -> RowsLoss:
        """Of the k tokens and one bucket for the others; ids are taken to be the student's."""
        ids, log_probs = select(self.ids, kept), select(self.log_probs, kept)

        def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            compare = partial(top_k_divergence, objective.divergence, ids[rows].long(), log_probs[rows])
            return weighed(logits, wanted[rows], compare, objective.temperature, objective.ce_weight)

        return loss


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
