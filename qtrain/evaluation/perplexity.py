"""Perplexity over non-overlapping windows of text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.errors import DataError
from qtrain.evaluation.inference import Logits, evaluating, logits_of, position_chunks
from qtrain.evaluation.progress import progress


@dataclass(frozen=True)
class Perplexity:
    """``perplexity = exp(loss)``; ``loss`` is the mean over ``tokens`` predicted tokens, in nats."""

    loss: float
    perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """The figures, as JSON takes them."""
        return asdict(self)


def token_windows(ids: list[int] | Tensor, length: int) -> list[Tensor]:
    """Cut a text's ids into non-overlapping windows [length]; what is left at the end is dropped.

    Raises:
        DataError: the text is shorter than one window.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    if length < 2:
        raise DataError(f"a window of {length} tokens predicts nothing", rule="length is at least 2")
    count = len(ids) // length
    if not count:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one window of {length}",
            fix="a longer text or a shorter window",
        )
    return list(ids[: count * length].view(count, length))


def perplexity(model: nn.Module | Logits, rows: Iterable[Tensor]) -> Perplexity:
    """exp of the mean loss at positions 1..n-1 of every row; the first token of a row has no context.

    Args:
        model: causal LM, or a function ids [B, L] -> logits [B, L, V]. Its modes are as before afterwards.
        rows: ids [L] or [B, L], without padding.

    Losses are taken in fp32 and summed in float64. A loss beyond the exponent's range gives infinity.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        for row in progress(rows, "perplexity"):
            ids = row.reshape(-1, row.shape[-1])
            logits, targets = predictions(logits_of(model, ids), ids)
            total += summed_loss(logits, targets)
            tokens += targets.numel()
    return mean_perplexity(total, tokens)


def predictions(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and the tokens [N] they predict, N = B (L - 1), on the logits' device."""
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device)


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Sum over N of the cross-entropies of logits [N, V] and targets [N]."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for chunk in position_chunks(*logits.shape):
        losses = F.cross_entropy(logits[chunk].float(), targets[chunk], reduction="none")
        total += losses.sum(dtype=torch.float64)
    return total.item()


def mean_perplexity(total: float, tokens: int) -> Perplexity:
    """The figures for a summed loss over that many tokens.

    Raises:
        DataError: there was no token to predict.
    """
    if not tokens:
        raise DataError("no token to measure on", rule="at least one row of two tokens")
    loss = total / tokens
    # exp overflows above 709.78; NaN passes through.
    return Perplexity(loss, math.inf if loss > 709 else math.exp(loss), tokens)
