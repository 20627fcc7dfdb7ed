"""How far a changed model has moved from the one it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.evaluation.inference import Logits, evaluating, logits_of, position_chunks
from qtrain.evaluation.perplexity import mean_perplexity, predictions, summed_loss
from qtrain.evaluation.progress import progress

IGNORED = -100


@dataclass(frozen=True)
class Drift:
    """``kl`` = mean of KL(reference || candidate) in nats a token; ``top1`` = share of equal likeliest tokens;
    ``spread`` = standard error of the mean difference of the two losses, in nats a token.
    """

    kl: float
    top1: float
    reference_perplexity: float
    candidate_perplexity: float
    tokens: int
    spread: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The figures, as JSON takes them."""
        return asdict(self)


def drift(
    reference: nn.Module | Logits,
    candidate: nn.Module | Logits,
    rows: Iterable[Tensor],
    *,
    labels: Iterable[Tensor] | None = None,
) -> Drift:
    """Compare two models on the same rows, position by position.

    KL(p || q) = sum over v of p_v (log p_v - log q_v), p of the reference, averaged over the predicted tokens. Equal
    perplexities can hide opposite errors; KL cannot.

    Args:
        reference: causal LM, or a function ids [B, L] -> logits [B, L, V].
        candidate: the same; it may live on another device, or be built anew from a file for each call.
        rows: ids [L] or [B, L].
        labels: of the rows' shapes; tokens labelled -100 are left out. Default: every token but a row's first.

    One row's logits of each model are held at a time.

    Raises:
        ModelError: the two vocabularies differ.
    """
    divergence, agreed, tokens, squares = 0.0, 0, 0, 0.0
    reference_loss, candidate_loss = 0.0, 0.0
    every = repeat(None) if labels is None else labels
    with evaluating(reference, candidate):
        for row, label in zip(progress(rows, "drift"), every, strict=labels is not None):
            ids = row.reshape(-1, row.shape[-1])
            p, targets = predictions(logits_of(reference, ids), ids)
            q, _ = predictions(logits_of(candidate, ids), ids)
            if p.shape != q.shape:
                raise ModelError(
                    f"the reference knows {p.shape[-1]} tokens, the candidate {q.shape[-1]}",
                    rule="drift compares distributions over the same vocabulary",
                    fix="compare before the embeddings are resized or padded",
                )
            if label is not None:
                counted = label.reshape(ids.shape)[:, 1:].flatten().to(p.device) != IGNORED
                p, q, targets = p[counted], q[counted.to(q.device)], targets[counted]
            row_divergence, row_agreed, row_squares = _compare(p, q, targets)
            divergence += row_divergence
            agreed += row_agreed
            squares += row_squares
            tokens += len(targets)
            reference_loss += summed_loss(p, targets)
            candidate_loss += summed_loss(q, targets.to(q.device))
    before, after = mean_perplexity(reference_loss, tokens), mean_perplexity(candidate_loss, tokens)
    difference = (candidate_loss - reference_loss) / tokens
    spread = math.sqrt(max(0.0, squares / tokens - difference**2) / tokens)
    return Drift(divergence / tokens, agreed / tokens, before.perplexity, after.perplexity, tokens, spread)


def _compare(p: Tensor, q: Tensor, targets: Tensor) -> tuple[float, int, float]:
    """Summed KL, the number of equal argmaxes and the summed squares of differences of losses of logits [N, V]."""
    divergence = torch.zeros((), dtype=torch.float64, device=p.device)
    agreed = torch.zeros((), dtype=torch.long, device=p.device)
    squares = torch.zeros((), dtype=torch.float64, device=p.device)
    for chunk in position_chunks(*p.shape):
        p_chunk, q_chunk = p[chunk].float(), q[chunk].to(p.device).float()
        log_p, log_q = p_chunk.log_softmax(-1), q_chunk.log_softmax(-1)
        # A token the reference rules out adds nothing (0 log 0 = 0), though the candidate may rule it out too.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        divergence += terms.sum(dtype=torch.float64)
        losses = (log_p - log_q).gather(-1, targets[chunk].to(p.device)[:, None])
        squares += losses.square().sum(dtype=torch.float64)
        agreed += (p_chunk.argmax(-1) == q_chunk.argmax(-1)).sum()
    return divergence.item(), int(agreed.item()), squares.item()
