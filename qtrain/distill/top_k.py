"""A divergence that knows the teacher by its k likeliest tokens alone: all others share one bucket.

P = (p_1 .. p_k, 1 - sum of them) and Q = (q at the same k tokens, 1 - sum of them) are distributions, D(P, Q) is a
divergence like any other. Merging outcomes never raises an f-divergence (data processing inequality), so D(P, Q) is a
lower bound of D(p, q), and equal to it where k is the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.kernels.divergence import IMPOSSIBLE, Divergence

LEAST_REST = 1e-6
"""Least mass of the teacher's rest. Log-probabilities kept in fp16 sum to 1 within some 1e-4, above or below."""


def top_k_divergence(divergence: Divergence, ids: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """D(P, Q) of each row [N], and dD/du [N, V] for the student's u with log q = log_softmax(u).

    With r = 1 - sum of q over the k tokens: log r is the logsumexp of log q over the other tokens, and the softmax of
    (log q at the k tokens, log r) is Q. So ``divergence`` gives the gradient for those k + 1 logits; that of log r is
    shared among the tokens of the rest by d log r / du_i = q_i / r.

    Args:
        ids: [N, k] int64, all different within a row.
        log_p: [N, k], of the teacher's softmax over the whole vocabulary.
        log_q: [N, V], of the student; overwritten.
    """
    top = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        rows, gradient = divergence(_normalized(log_p.to(log_q.dtype)), top)
        return rows, log_q.scatter_(-1, ids, gradient)
    others = log_q.scatter_(-1, ids, -torch.inf)
    log_rest = others.logsumexp(-1, keepdim=True).clamp_(min=IMPOSSIBLE)
    within = others.sub_(log_rest).exp_()
    rows, gradient = divergence(teacher_buckets(log_p.to(log_q.dtype)), torch.cat((top, log_rest), -1))
    return rows, within.mul_(gradient[:, -1:]).scatter_(-1, ids, gradient[:, :-1])


def teacher_buckets(log_p: Tensor) -> Tensor:
    """log P [N, k + 1] of the k tokens' log-probabilities [N, k]: the rest is what they lack of 1."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_(min=LEAST_REST)
    return _normalized(torch.cat((log_p, rest.log_()), -1))


def _normalized(log_p: Tensor) -> Tensor:
    return torch.log_softmax(log_p, -1).clamp_(min=IMPOSSIBLE)
