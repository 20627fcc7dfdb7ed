"""Scales and turns of key channels with which quantization costs the scores least, by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, RATE = 200, 0.05
"""Of Adam, falling to 0. 1,200 steps, or rates from 0.02 to 0.1, give the same error to four digits (SmolLM2)."""
TOKENS, NUMBERS = 1024, 1 << 21
"""Of keys that are looked at, at most; 512 tokens of a 7B's 4096 numbers. 4,096 tokens leave 1 % less error."""
FURTHEST = 4.0
"""Of log s: channels that no query looks at would go on to infinity."""

Span = Callable[[Tensor], Tensor]
"""Keys [tokens, H, D] -> the size of a quantization step for each of their numbers, up to a factor."""


@dataclass(frozen=True)
class KeyFold:
    """k' = R(t) k / s and q' = R(t) q s for each pair of channels that RoPE turns: R commutes with it, q'^T k' = q^T k.

    Attributes:
        scale, turn: s and t, in radians [heads, D / 2].
        pair: [D], which of D / 2 pairs a channel belongs to.
    """

    scale: Tensor
    turn: Tensor
    pair: Tensor

    def keys(self, k: Tensor) -> Tensor:
        """[.., heads, D]; one head's s and t may serve all."""
        return self._changed(k, 1 / self.scale)

    def queries(self, q: Tensor) -> Tensor:
        """[.., heads, D], heads of the keys."""
        return self._changed(q, self.scale)

    def double(self) -> KeyFold:
        """In float64."""
        return KeyFold(self.scale.double(), self.turn.double(), self.pair)

    def _changed(self, x: Tensor, scale: Tensor) -> Tensor:
        first, second = self.pair.argsort(stable=True).view(-1, 2).unbind(1)
        a, b = x[..., first], x[..., second]
        cos, sin = scale * self.turn.cos(), scale * self.turn.sin()
        halves = torch.cat([cos * a - sin * b, sin * a + cos * b], dim=-1)
        return halves[..., torch.cat([first, second]).argsort()]


@torch.enable_grad()
def search(keys: Tensor, queries: Tensor, pair: Tensor, span: Span, *, turns: bool) -> KeyFold:
    """The s and t of least E[sum_i span_i(k')^2 q'_i^2]: rounding is off by span / sqrt(12), and q multiplies it.

    Without t, s moves outlier channels into the queries (SmoothAttention: Lin 2024, QServe, arXiv 2405.04532). With
    t, a pair whose one channel is large on all tokens shares it out between both, on the same side of zero in all
    pairs, and the range is narrower. SmolLM2, int4 keys and values before RoPE, perplexity on twelve windows of
    WikiText-2, full 30.1: a scale for each head 33.6, with s 32.4, with s and t 31.3; for all heads 38.0, 32.0.

    Args:
        keys: as they are quantized [tokens, H, D].
        queries: E[q^2] [heads, D / 2]; heads is H, or 1 where all share s.
        turns: search t too, else it is 0.
    """
    tokens = max(1, min(TOKENS, NUMBERS // keys[0].numel()))
    keys = keys[:: -(-len(keys) // tokens)]
    log_scale = torch.zeros_like(queries, requires_grad=True)
    turn = _begin(keys, pair, len(queries)) if turns else torch.zeros_like(queries)
    turn.requires_grad_(turns)
    trained = [log_scale, turn] if turns else [log_scale]
    adam = torch.optim.Adam(trained, lr=RATE)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        change = KeyFold(log_scale.exp(), turn, pair)
        weight = (change.scale.square() * queries)[:, pair]
        loss = (span(change.keys(keys)).square() * weight).sum(dim=(1, 2)).mean()
        adam.zero_grad()
        # Of no keys or queries but zeros the loss is 0, and so is its gradient then, not NaN.
        loss.clamp_min(torch.finfo(loss.dtype).tiny).log().backward()
        adam.step()
        with torch.no_grad():
            log_scale -= log_scale.mean()
            log_scale.clamp_(-FURTHEST, FURTHEST)
    return KeyFold(log_scale.detach().exp(), turn.detach(), pair)


def span_of(symmetric: bool, width: int | None, together: bool) -> Span:
    """Of dynamic ranges.

    Args:
        symmetric: by the largest magnitude, else from the least to the largest number, 0 included.
        width: channels of a head with one range; None: all of them.
        together: all heads of a token have one range.
    """

    def span(keys: Tensor) -> Tensor:
        rows = keys.flatten(1).unsqueeze(1) if together else keys.unflatten(-1, (-1, width or keys.shape[-1]))
        if symmetric:
            reach = 2 * rows.abs().amax(dim=-1, keepdim=True)
        else:
            reach = rows.amax(dim=-1, keepdim=True).clamp(min=0) - rows.amin(dim=-1, keepdim=True).clamp(max=0)
        return reach.expand_as(rows).reshape(keys.shape)

    return span


def _begin(keys: Tensor, pair: Tensor, heads: int) -> Tensor:
    """The turns that give both channels of each pair the same mean, above zero."""
    mean = keys.mean(dim=0)
    mean = mean if len(mean) == heads else mean.mean(dim=0, keepdim=True)
    first, second = pair.argsort(stable=True).view(-1, 2).unbind(1)
    return math.pi / 4 - torch.atan2(mean[:, second], mean[:, first])
