"""The summed distillation loss of a batch, by the path that fits student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.distill.cached import CachedLogits
from qtrain.distill.chunked_loss import product_dtype
from qtrain.distill.divergence import Objective
from qtrain.distill.eval_mode import eval_mode
from qtrain.distill.linear_divergence import Target, TeacherHead, TopK, linear_divergence, logits_divergence
from qtrain.distill.teacher import Teacher
from qtrain.modules.token_loss import INPUTS, Loss

Head = Callable[[PreTrainedModel, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""(model, hidden [..., d]) → what its output head multiplies: input [..., d], weight [vocab, d], bias [vocab].

A quantized head gives its fake-quantized weight here (and input, where that is quantized too), both differentiable.
"""

ROWS = "rows"
"""The key of a batch's row numbers [B] in the data set, by which cached logits are found."""


def plain_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of an ``nn.Linear`` head."""
    head = model.get_output_embeddings()
    return hidden, head.weight, getattr(head, "bias", None)


def choose_online(
    student: PreTrainedModel, teacher: Teacher, objective: Objective, head: Head = plain_head
) -> tuple[Loss, str]:
    """The loss against a teacher that runs beside the student; and which path it takes, in words.

    In chunks of tokens where both heads are products, which a probe of 8 tokens shows; from whole logits elsewhere.
    Position t is compared where ``labels[t + 1]`` is not -100.
    """
    reason = not_a_product(student, head) or not_a_product(teacher.model, plain_head)
    if reason:
        return _whole(student, objective, lambda batch: teacher.logits(batch)[:, :-1]), f"whole logits: {reason}"

    def target(batch: Mapping[str, Tensor]) -> Target:
        return TeacherHead(*plain_head(teacher.model, teacher.hidden(batch)[:, :-1]))

    return _chunked(student, objective, target, head), f"{objective.loss} from the teacher, in chunks"


def choose_cached(
    student: PreTrainedModel, cache: CachedLogits, objective: Objective, head: Head = plain_head
) -> tuple[Loss, str]:
    """The loss against cached logits: batches carry the ``rows`` that they were made of."""

    def target(batch: Mapping[str, Tensor]) -> Target:
        ids = batch["input_ids"]
        found = TopK(*cache.rows(batch[ROWS].tolist(), length=ids.shape[1]))
        return TopK(found.ids[:, :-1].to(ids.device), found.log_probs[:, :-1].to(ids.device))

    reason = not_a_product(student, head)
    if reason:
        return _whole(student, objective, target), f"whole logits: {reason}"
    return _chunked(student, objective, target, head), f"{objective.loss} from cached logits, in chunks"


def not_a_product(model: PreTrainedModel, head: Head) -> str | None:
    """Why the head's factors do not give the model's logits (soft-capping, a scale, ...); None where they do."""
    inputs = {"input_ids": torch.arange(1, 9, device=next(model.parameters()).device)[None], "use_cache": False}
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(**inputs).logits
            x, weight, bias = head(model, model.get_decoder()(**inputs).last_hidden_state)
            dtype = product_dtype(weight)
            product = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            distance = (product.double() - logits.double()).norm() / logits.double().norm()
    except (AttributeError, TypeError, NotImplementedError, RuntimeError) as error:
        return " ".join(str(error).split())[:80]
    # Both are the same product in the same dtype, up to the order of its sums; an int8 head is 0.7 % away.
    return None if distance < (4e-3 if logits.element_size() < 4 else 1e-4) else "this head is more than a product"


def _chunked(
    student: PreTrainedModel, objective: Objective, target: Callable[[Mapping[str, Tensor]], Target], head: Head
) -> Loss:
    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        hidden = student.get_decoder()(**_inputs(batch), use_cache=False).last_hidden_state[:, :-1]
        x, weight, bias = head(student, hidden)
        return linear_divergence(x, weight, target(batch), batch["labels"][:, 1:], objective, bias)

    return loss


def _whole(student: PreTrainedModel, objective: Objective, target: Callable[[Mapping[str, Tensor]], Target]) -> Loss:
    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        logits = student(**_inputs(batch), use_cache=False).logits[:, :-1]
        return logits_divergence(logits, target(batch), batch["labels"][:, 1:], objective)

    return loss


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in INPUTS if key in batch}
