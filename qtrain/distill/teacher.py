"""The full-precision model that a student learns from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.distill.config import DistillSection
from qtrain.distill.head_product import not_a_product
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model
from qtrain.modules.documents import known_rows
from qtrain.modules.head import head_factors
from qtrain.modules.token_loss import INPUTS

Context = Callable[[], AbstractContextManager[Any]]


class Teacher:
    """A frozen causal language model beside the student.

    It is no ``nn.Module``: as an attribute of one it adds nothing to ``parameters()``, ``state_dict()`` or ``to()``.

    Args:
        model: in full precision; it is frozen and put in eval mode.
        context: what its forward passes run in, such as the autocast of the training.
    """

    def __init__(self, model: PreTrainedModel, context: Context = nullcontext) -> None:
        self.model: PreTrainedModel = model.requires_grad_(False).eval()
        self._context = context

    def to(self, device: torch.device | str) -> Teacher:
        """Move the model."""
        self.model.to(device)  # type: ignore[arg-type]  # the decorator on it loses `self`
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What enters the output head [B, L, d], without a graph."""
        hidden: Tensor = self._run(self.model.get_decoder(), batch).last_hidden_state
        return hidden

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, L, vocab], without a graph."""
        logits: Tensor = self._run(self.model, batch).logits
        return logits

    @cached_property
    def not_a_product(self) -> str | None:
        """Why ``hidden`` and the head's factors do not give ``logits``; None where they do."""
        with self._context():
            return not_a_product(self.model, head_factors)

    def row_logits(self, batch: Mapping[str, Tensor], lengths: Sequence[int]) -> Iterator[Tensor]:
        """Logits [length, vocab] of each row of a batch, one row at a time, as ``write_cache`` takes them."""
        if self.not_a_product:
            yield from (row[:length] for row, length in zip(self.logits(batch), lengths, strict=True))
            return
        for row, length in zip(self.hidden(batch), lengths, strict=True):
            with torch.no_grad(), self._context():
                logits = F.linear(*head_factors(self.model, row[:length]))
            yield logits

    def _run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        inputs = {key: batch[key].to(self.device) for key in INPUTS if key in batch}
        with torch.no_grad(), self._context(), known_rows(model, batch):
            return model(**inputs, use_cache=False)


def snapshot(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A frozen copy of ``model`` that shares no tensor with it: take it before the model is quantized.

    Tied weights are tied in the copy too. Buffers keep their dtype: rotary frequencies in bf16 would turn late
    positions by other angles.

    Args:
        dtype: of the copy's parameters; default: as they are.
    """
    # deepcopy takes what its memo holds already: parameters are copied once, in their new dtype, without gradients.
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype or parameter.dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    copied: PreTrainedModel = copy.deepcopy(model, copies).eval()
    return copied


def teacher_model(
    section: DistillSection, model: PreTrainedModel, base: ModelSection, dtype: torch.dtype
) -> PreTrainedModel:
    """What ``distill.teacher`` names, in ``dtype``: a snapshot of ``model`` where it names nothing.

    Args:
        model: the student, as loaded.
        base: the student's section, whose attention back end the teacher takes too.

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    if section.teacher is None:
        return snapshot(model, dtype)
    return load_model(named_teacher(section, base), dtype)


def named_teacher(section: DistillSection, base: ModelSection) -> ModelSection:
    """The section of the model that ``distill.teacher`` names."""
    return base.model_copy(update={"path": section.teacher, "revision": None})
