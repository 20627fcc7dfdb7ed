"""Divergences between a teacher's and a student's next-token distributions, each with its gradient.

p = softmax(t / T) of the teacher's logits t, q that of the student's z. With u = z / T and f = dD/dq,
dD/du_i = q_i (f_i - sum over j of q_j f_j); no gradient goes to the teacher. loss of a row =
(1 - ce_weight) T^2 D(p, q) + ce_weight (-log softmax(z)[target]); T^2 keeps the gradient's size (Hinton 2015,
arXiv 1503.02531).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from qtrain.kernels import divergence_tiles
except ImportError:  # Triton comes with torch where there is a GPU
    divergence_tiles = None  # type: ignore[assignment]

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log p, log q) [N, V], both of which it may overwrite → (D of each row [N], dD/du [N, V])."""

IGNORED = -100
"""The target of a row that carries no loss."""
IMPOSSIBLE = -1e4
"""Stands for log 0, so that 0 log 0 is 0 and not NaN: its exponential is 0 in fp32 and in fp64."""


def divergence_(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    loss: str,
    temperature: float,
    ce_weight: float,
    jsd_beta: float,
) -> tuple[Tensor, Tensor]:
    """(loss of each row in nats [rows], its gradient for the student's logits [rows, vocab]).

    Args:
        student: logits z [rows, vocab]. Where the kernel runs they become the gradient, rounded to their dtype.
        teacher: logits t [rows, vocab], of any float dtype; -inf rules a token out.
        target: int64 [rows], each a column, or ``IGNORED``: the row's loss and gradient are 0.
        loss: D: forward_kl, reverse_kl or jsd.
        temperature: T.
        ce_weight: share of the cross-entropy.
        jsd_beta: the teacher's share of the mixture of jsd, above 0 and below 1.
    """
    of = plain
    if one_pass(student.device, student.dtype, teacher.dtype) and student.is_contiguous():
        of = divergence_tiles.divergence_
    return of(student, teacher, target, loss=loss, temperature=temperature, ce_weight=ce_weight, jsd_beta=jsd_beta)


def one_pass(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the kernel runs there for logits of these dtypes."""
    return divergence_tiles is not None and device.type == "cuda" and all(d in divergence_tiles.DTYPES for d in dtypes)


def plain(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    loss: str,
    temperature: float,
    ce_weight: float,
    jsd_beta: float,
) -> tuple[Tensor, Tensor]:
    """``divergence_`` in PyTorch's operations; the gradient is fp32 (fp64 stays), the logits are left as they are."""

    def compare(log_q: Tensor) -> tuple[Tensor, Tensor]:
        return divergence(loss, jsd_beta)(log_softmax(teacher, temperature), log_q)

    return weighed(student, target, compare, temperature, ce_weight)


def weighed(
    student: Tensor,
    target: Tensor,
    compare: Callable[[Tensor], tuple[Tensor, Tensor]],
    temperature: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient, by ``compare``: log q, which it may overwrite → (D, dD/du)."""
    rows, gradient = compare(log_softmax(student, temperature))
    # d/dz = (1/T) d/du, times T^2
    rows, gradient = rows * (temperature**2 * (1 - ce_weight)), gradient.mul_(temperature * (1 - ce_weight))
    if ce_weight:
        entropy, onward = cross_entropy(student, target.clamp(min=0))
        rows, gradient = rows.add_(entropy, alpha=ce_weight), gradient.add_(onward, alpha=ce_weight)
    ignored = target == IGNORED
    return rows.masked_fill_(ignored, 0.0), gradient.masked_fill_(ignored[:, None], 0.0)


def divergence(loss: str, jsd_beta: float) -> Divergence:
    """D and its gradient, by name."""
    known: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": partial(jsd, beta=jsd_beta),
    }
    return known[loss]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum of p (log p - log q); dD/du = q - p."""
    p = log_p.exp()
    rows = log_p.sub_(log_q).mul_(p).sum(-1)
    return rows, log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum of q (log q - log p); dD/du = q (log q - log p - KL(q || p))."""
    q = log_q.exp()
    ratio = log_q.sub_(log_p)
    rows = torch.mul(q, ratio, out=log_p).sum(-1, keepdim=True)
    return rows.squeeze(-1), ratio.sub_(rows).mul_(q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    The generalised Jensen-Shannon divergence of GKD (Agarwal 2023, arXiv 2306.13649): D / beta tends to KL(p || q) as
    beta goes to 0, D / (1 - beta) to KL(q || p) as it goes to 1. dD/du = (1 - beta) q (log q - log m - KL(q || m)).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_teacher = (log_p - log_m).mul_(log_p.exp_()).sum(-1)
    q = log_q.exp()
    ratio = log_q.sub_(log_m)
    rows = torch.mul(q, ratio, out=log_m).sum(-1, keepdim=True)
    return beta * of_teacher + (1 - beta) * rows.squeeze(-1), ratio.sub_(rows).mul_(q).mul_(1 - beta)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log q[target] of each row, T = 1, and its gradient q - onehot for the logits [N, V]."""
    log_q = log_softmax(logits)
    picked = log_q.gather(-1, target[:, None])
    gradient = log_q.exp_().scatter_add_(-1, target[:, None], torch.full_like(picked, -1.0))
    return -picked.squeeze(-1), gradient


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) [N, V] in fp32 (fp64 stays), a tensor of its own, -inf as ``IMPOSSIBLE``."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits if temperature == 1 else logits.to(wide) / temperature
    return F.log_softmax(scaled, -1, dtype=wide).clamp_(min=IMPOSSIBLE)
