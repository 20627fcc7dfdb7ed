"""Attention with the newest tokens in full precision (KIVI, Liu 2024, arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """Which tokens a query sees as codes, counted in columns of the batch (padding counts).

    A query that sees n tokens, itself among them, has the first ``keys(n)`` keys and ``values(n)`` values as codes.

    Attributes:
        residual: tokens that stay in full precision at least.
        group: keys become codes this many at a time; values one by one.
    """

    residual: int
    group: int = 1

    def keys(self, seen: int) -> int:
        """group floor(max(0, seen - residual) / group)."""
        return max(0, seen - self.residual) // self.group * self.group

    def values(self, seen: int) -> int:
        """max(0, seen - residual)."""
        return max(0, seen - self.residual)


def seen_pairs(mask: Tensor | None) -> Tensor | None:
    """An sdpa (bool) or eager (added) mask [B, 1 or H, S_q, S_k] as bool: True is seen. None stays None: causal."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def without_padding(x: Tensor, seen: Tensor | None) -> Tensor:
    """Keys or values [B, H_kv, n, D] of the newest n columns, zero where no query sees them.

    Zeros never widen a range, so that padding does not decide the scale of a group of tokens it is in.
    """
    if seen is None:
        return x
    columns = seen[:, :1, :, seen.shape[-1] - x.shape[2] :].any(dim=2).unsqueeze(-1)
    return x.masked_fill(~columns, 0.0)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coded_key: Tensor,
    coded_value: Tensor,
    window: Window,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling q k^T + mask) v, where each query sees old keys and values as codes and new ones as they are.

    Plain products with all scores in memory: S_q S_k numbers a head. A query that sees nothing (padding) gets zeros.

    Args:
        query: [B, H, S_q, D], of the last S_q tokens.
        key, value: [B, H_kv, S_k, D] in full precision (what is codes already in a cache: dequantized).
        coded_key, coded_value: [B, H_kv, n, D], the first n tokens that the last query sees as codes.
        mask: as of sdpa or eager attention, [B, 1 or H, S_q, S_k], bool (True is seen) or added; None is causal.
        softcap: Gemma 2's c: c tanh(scores / c).

    Returns:
        [B, S_q, H, D] and the probabilities [B, H, S_q, S_k].
    """
    batch, heads, queries, _ = query.shape
    grouped = query.unflatten(1, (key.shape[1], -1))
    columns = key.shape[2]
    seen = torch.arange(columns - queries + 1, columns + 1, device=query.device)
    old = (seen - window.residual).clamp(min=0)
    scores = _products(grouped, key)
    old_keys = _before(old // window.group * window.group, coded_key.shape[2])
    coded = torch.where(old_keys, _products(grouped, coded_key), scores[..., : coded_key.shape[2]])
    scores = torch.cat([coded, scores[..., coded_key.shape[2] :]], dim=-1).flatten(1, 2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    pairs = seen_pairs(mask)
    hidden = ~_before(seen, columns) if pairs is None else ~pairs
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype).masked_fill(hidden, 0.0)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    spread = weights.unflatten(1, (key.shape[1], -1))
    old_values = F.pad(_before(old, coded_value.shape[2]), (0, columns - coded_value.shape[2]))
    output = spread.masked_fill(old_values, 0.0) @ value.unsqueeze(2)
    output = output + (spread * old_values)[..., : coded_value.shape[2]] @ coded_value.unsqueeze(2)
    return output.flatten(1, 2).transpose(1, 2).contiguous(), weights


def _products(grouped: Tensor, key: Tensor) -> Tensor:
    """q k^T of queries [B, H_kv, H / H_kv, S_q, D] with the keys of their group."""
    return grouped @ key.unsqueeze(2).transpose(-1, -2)


def _before(bounds: Tensor, columns: int) -> Tensor:
    """Whether column j lies before each query's bound, [S_q, columns]."""
    return torch.arange(columns, device=bounds.device) < bounds.unsqueeze(-1)
