"""What distillation minimizes at a token."""

from __future__ import annotations

from dataclasses import dataclass

from qtrain.distill.config import DistillSection
from qtrain.kernels.divergence import Divergence, divergence


@dataclass(frozen=True)
class Objective:
    """loss of a token = (1 - ce_weight) T^2 D(p, q) + ce_weight (-log softmax(student's logits)[next token]).

    p = softmax(teacher's logits / T), q that of the student's: ``qtrain.kernels.divergence``, which takes these fields.

    Attributes:
        loss: forward_kl, reverse_kl or jsd.
        temperature: T; T^2 keeps the gradient's size (Hinton 2015, arXiv 1503.02531).
        jsd_beta: the teacher's share of the mixture, above 0 and below 1.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    ce_weight: float = 0.0
    jsd_beta: float = 0.5

    @classmethod
    def of(cls, section: DistillSection) -> Objective:
        """What ``distill.*`` asks for."""
        return cls(section.loss, section.temperature, section.ce_weight, section.jsd_beta)

    @property
    def divergence(self) -> Divergence:
        """D and its gradient."""
        return divergence(self.loss, self.jsd_beta)
