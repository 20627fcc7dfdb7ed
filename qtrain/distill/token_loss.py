"""The summed distillation loss of a batch, by the path that fits student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.distill.cached import CachedLogits
from qtrain.distill.divergence import Objective
from qtrain.distill.head_product import Head, not_a_product
from qtrain.distill.linear_divergence import linear_divergence, logits_divergence
from qtrain.distill.targets import Target, TeacherHead, TeacherLogits, TopK, same_vocabulary
from qtrain.distill.teacher import Teacher
from qtrain.kernels.divergence import one_pass
from qtrain.modules.documents import known_rows
from qtrain.modules.head import head_factors
from qtrain.modules.token_loss import INPUTS, ROWS, Loss


def choose_online(
    student: PreTrainedModel, teacher: Teacher, objective: Objective, head: Head = head_factors
) -> tuple[Loss, str]:
    """The loss against a teacher that runs beside the student; and which path it takes, in words.

    In chunks of tokens where both heads are products, from whole logits elsewhere. Position t counts where
    ``labels[t + 1]`` is not -100.

    Raises:
        ModelError: the two vocabularies differ.
    """
    same_vocabulary(_vocabulary(student), _vocabulary(teacher.model))
    by = _by(one_pass(student.device, student.dtype, teacher.model.dtype))
    reason = not_a_product(student, head) or teacher.not_a_product
    if reason:

        def whole(batch: Mapping[str, Tensor]) -> Target:
            return TeacherLogits(teacher.logits(batch)[:, :-1])

        return _whole(student, objective, whole), f"whole logits, {by}: {reason}"

    def target(batch: Mapping[str, Tensor]) -> Target:
        return TeacherHead(*head_factors(teacher.model, teacher.hidden(batch)[:, :-1]))

    return _chunked(student, objective, target, head), f"{objective.loss} from the teacher, {by}, in chunks"


def choose_cached(
    student: PreTrainedModel, cache: CachedLogits, objective: Objective, head: Head = head_factors
) -> tuple[Loss, str]:
    """The loss against cached logits: batches carry the ``rows`` that they were made of.

    Raises:
        ModelError: the two vocabularies differ.
    """
    same_vocabulary(_vocabulary(student), cache.vocab)
    by = _by(kernel=False)  # top-k buckets have none

    def target(batch: Mapping[str, Tensor]) -> Target:
        ids = batch["input_ids"]
        found = cache.rows(batch[ROWS].tolist(), length=ids.shape[1])
        return TopK(*(_on(ids.device, part[:, :-1]) for part in found))

    reason = not_a_product(student, head)
    if reason:
        return _whole(student, objective, target), f"whole logits, {by}: {reason}"
    return _chunked(student, objective, target, head), f"{objective.loss} from cached logits, {by}, in chunks"


def _chunked(
    student: PreTrainedModel, objective: Objective, target: Callable[[Mapping[str, Tensor]], Target], head: Head
) -> Loss:
    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        wanted = target(batch)  # first: the teacher's activations are gone when the student's are kept
        with known_rows(student, batch):
            hidden = student.get_decoder()(**_inputs(batch), use_cache=False).last_hidden_state[:, :-1]
        x, weight, bias = head(student, hidden)
        return linear_divergence(x, weight, wanted, batch["labels"][:, 1:], objective, bias)

    return loss


def _whole(student: PreTrainedModel, objective: Objective, target: Callable[[Mapping[str, Tensor]], Target]) -> Loss:
    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        wanted = target(batch)
        with known_rows(student, batch):
            logits = student(**_inputs(batch), use_cache=False).logits[:, :-1]
        return logits_divergence(logits, wanted, batch["labels"][:, 1:], objective)

    return loss


def _by(kernel: bool) -> str:
    return "a kernel in Triton" if kernel else "plain PyTorch"


def _on(device: torch.device, part: Tensor) -> Tensor:
    """A copy from pageable memory would wait until the GPU has done all its work."""
    return part.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in INPUTS if key in batch}
