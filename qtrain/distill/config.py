"""`distill.*`: what a full-precision teacher adds to the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from qtrain.errors import ConfigError
from qtrain.section import Section

ONLINE = "distill.teacher_logits=online runs the teacher beside the student"


class LayerwiseSection(Section):
    """`distill.layerwise.*`: each block learns to answer as its full-precision twin, before training (ZeroQuant)."""

    steps: int = Field(50, ge=1, description="optimizer steps for each block")
    lr: float = Field(1e-4, gt=0, description="learning rate of those")
    rows: int = Field(128, ge=1, description="rows of training text that they see")
    batch_size: int = Field(8, ge=1, description="rows in a step")


class DistillSection(Section):
    """loss of a token = (1 - ce_weight) T^2 D(teacher, student) + ce_weight (-log student(next token)).

    D compares the softmaxes of logits / T (Hinton 2015, arXiv 1503.02531: T^2 keeps the gradient's size).
    """

    loss: Literal["none", "forward_kl", "reverse_kl", "jsd"] = Field(
        "none", description="divergence from the teacher; none trains on the data's tokens alone"
    )
    teacher: str | None = Field(
        None, description="as model.path; default: the model as it was loaded, before it is quantized"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of both before they are compared")
    ce_weight: float = Field(0.0, ge=0, le=1, description="share of the cross-entropy in the loss")
    jsd_beta: float = Field(0.5, description="teacher's share of the mixture that loss=jsd compares with")
    teacher_logits: Literal["online", "cached"] = Field(
        "online",
        description="online runs the teacher beside the student; cached writes its top_k logits to files first",
    )
    top_k: int = Field(64, ge=1, description="logits a token that are cached; the others share one bucket")
    layerwise: LayerwiseSection | None = Field(
        None, description="blocks learn one by one from the teacher's before the training; works with loss=none too"
    )
    cache_dir: str | None = Field(
        None, description="directory of the cached logits, for several runs; default: RUN/teacher_logits"
    )

    @field_validator("jsd_beta")
    @classmethod
    def _between_teacher_and_student(cls, beta: float) -> float:
        if not 0 < beta < 1:
            raise ValueError(
                "the divergence is 0 for every student there; above 0 and below 1, or distill.loss=forward_kl (the "
                "limit at 0), distill.loss=reverse_kl (at 1)"
            )
        return beta

    @model_validator(mode="after")
    def _a_loss_is_named(self) -> DistillSection:
        asked = self.model_fields_set - {"loss", "layerwise"}
        if self.layerwise is not None:
            asked -= {"teacher"}  # the blocks have a use for it
        if asked and "loss" not in self.model_fields_set:
            keys = ", ".join(f"distill.{key}" for key in type(self).model_fields if key in asked)
            raise ValueError(f"{keys} without a loss to use it: distill.loss=forward_kl (or reverse_kl, jsd, none)")
        return self

    @property
    def cached(self) -> bool:
        """Whether the training reads its teacher from files."""
        return self.loss != "none" and self.teacher_logits == "cached"

    def check_streaming(self, streaming: bool) -> None:
        """Refuse training data that is a stream where its rows must have numbers.

        Raises:
            ConfigError: both keys.
        """
        if self.cached and streaming:
            raise ConfigError(
                "distill.teacher_logits=cached with data.streaming=true",
                rule="cached logits are found by the number of a row, and the rows of a stream have none",
                fix=f"data.streaming=false; {ONLINE}",
            )

    @model_validator(mode="after")
    def _the_teacher_has_a_share(self) -> DistillSection:
        if self.loss != "none" and self.ce_weight == 1:
            raise ValueError(
                f"ce_weight=1 leaves distill.loss={self.loss} no share, the teacher would run for nothing: "
                "distill.ce_weight below 1, or distill.loss=none"
            )
        return self
