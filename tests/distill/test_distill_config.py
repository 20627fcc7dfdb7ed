"""The keys of `distill.*`, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qtrain.config.problems import problems
from qtrain.distill.config import DistillSection
from qtrain.distill.divergence import Objective


def refused(**values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        DistillSection.model_validate(values)
    return "\n".join(error.message() for error in problems("distill", DistillSection, caught.value))


def test_nothing_is_distilled_unless_asked() -> None:
    section = DistillSection()
    assert (section.loss, section.teacher, section.teacher_logits) == ("none", None, "online")


def test_the_objective_is_what_the_keys_say() -> None:
    section = DistillSection(loss="jsd", temperature=2.0, ce_weight=0.25, jsd_beta=0.1)
    assert Objective.of(section) == Objective("jsd", 2.0, 0.25, 0.1)
    assert Objective.of(DistillSection(loss="forward_kl")) == Objective()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": "kl"}, ["distill.loss='kl'", "none|forward_kl|reverse_kl|jsd", "distill.loss=none"]),
        ({"loss": "jsd", "jsd_beta": 0.0}, ["distill.jsd_beta=0.0", "distill.loss=forward_kl", "distill.loss=reverse"]),
        ({"loss": "jsd", "jsd_beta": 1.0}, ["distill.jsd_beta=1.0", "0 for every student", "distill.jsd_beta=0.5"]),
        ({"loss": "jsd", "temperature": 0}, ["distill.temperature=0", "number > 0"]),
        ({"loss": "jsd", "ce_weight": 1.5}, ["distill.ce_weight=1.5", ">= 0, <= 1"]),
        ({"loss": "jsd", "ce_weight": 1}, ["leaves distill.loss=jsd no share", "distill.loss=none"]),
        ({"loss": "jsd", "top_k": 0}, ["distill.top_k=0", ">= 1"]),
        ({"teacher_logits": "cache"}, ["distill.teacher_logits='cache'", "online|cached"]),
        ({"temperature": 2}, ["distill.temperature without a loss", "distill.loss=forward_kl"]),
        (
            {"teacher": "gpt2", "ce_weight": 0.5},
            ["distill.teacher, distill.ce_weight without a loss", "distill.loss=forward_kl"],
        ),
        ({"temprature": 2}, ["temprature", "did you mean 'temperature'?"]),
    ],
)
def test_a_mistake_is_told_with_the_way_out(values: dict[str, Any], words: list[str]) -> None:
    message = refused(**values)
    assert all(word in message for word in words), message


def test_a_resolved_section_is_read_back_and_loss_none_turns_everything_off() -> None:
    for section in (DistillSection(), DistillSection(loss="jsd", temperature=3, teacher="gpt2")):
        assert DistillSection.model_validate(section.model_dump()) == section
    assert DistillSection(loss="none", teacher="gpt2", temperature=2.0, ce_weight=1.0).loss == "none"
