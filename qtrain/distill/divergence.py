"""Divergences between a teacher's and a student's next-token distribution, each with its gradient.

p = softmax(z / T) of the teacher's logits z, q that of the student's. With u = z / T of the student and f = dD/dq,
dD/du_i = q_i (f_i - sum over j of q_j f_j); no gradient goes to the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.distill.config import DistillSection

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p, log q) [N, V], both of which it may overwrite → (D summed over the rows, dD/du [N, V])."""

IMPOSSIBLE = -1e4
"""Stands for log 0, so that 0 log 0 is 0 and not NaN: its exponential is 0 in fp32 and in fp64."""


@dataclass(frozen=True)
class Objective:
    """loss of a token = (1 - ce_weight) T^2 D(p, q) + ce_weight (-log softmax(student's logits)[next token]).

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
        known: dict[str, Divergence] = {
            "forward_kl": forward_kl,
            "reverse_kl": reverse_kl,
            "jsd": partial(jsd, beta=self.jsd_beta),
        }
        return known[self.loss]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum of p (log p - log q); dD/du = q - p."""
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum()
    return value, log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum of q (log q - log p); dD/du = q (log q - log p - KL(q || p))."""
    q = log_q.exp()
    ratio = log_q.sub_(log_p)
    rows = torch.mul(q, ratio, out=log_p).sum(-1, keepdim=True)
    return rows.sum(), ratio.sub_(rows).mul_(q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    The generalised Jensen-Shannon divergence of GKD (Agarwal 2023, arXiv 2306.13649): D / beta tends to KL(p || q) as
    beta goes to 0, D / (1 - beta) to KL(q || p) as it goes to 1. dD/du = (1 - beta) q (log q - log m - KL(q || m)).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_teacher = (log_p - log_m).mul_(log_p.exp_()).sum()
    q = log_q.exp()
    ratio = log_q.sub_(log_m)
    rows = torch.mul(q, ratio, out=log_m).sum(-1, keepdim=True)
    return beta * of_teacher + (1 - beta) * rows.sum(), ratio.sub_(rows).mul_(q).mul_(1 - beta)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log q[target], T = 1, and its gradient q - onehot for the logits [N, V]."""
    log_q = log_softmax(logits)
    picked = log_q.gather(-1, target[:, None])
    gradient = log_q.exp_().scatter_add_(-1, target[:, None], torch.full_like(picked, -1.0))
    return -picked.sum(), gradient


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) [N, V] in fp32 (fp64 stays), a tensor of its own, -inf as ``IMPOSSIBLE``."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits if temperature == 1 else logits.to(wide) / temperature
    return F.log_softmax(scaled, -1, dtype=wide).clamp_(min=IMPOSSIBLE)
