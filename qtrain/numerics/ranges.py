"""Scales found by search: the least squared error in place of the largest number."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.affine import QParams, choose_qparams, grouped, round_scale
from qtrain.numerics.spec import QuantSpec

CHUNK_ELEMENTS = 2**20
"""Weights tried at a time, for bounded memory. Smaller chunks fit a cache but wait for threads: on two cores shared
with other work 2^17 took ten times as long as alone."""


def search_qparams(
    x: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    *,
    steps: int = 20,
    shrink: float = 0.7,
    grow: float = 1.1,
    refits: int = 2,
) -> QParams:
    """Scales with the least sum_j h_j (x_j - s q_j)^2 of each group: a search, then a descent.

    Fractions of the absmax scale are tried first; then, given the best codes, the least-squares scale
    s = sum h q x / sum h q^2, and codes anew (20 candidates and 2 refits reach what 80 candidates reach alone).
    With h_j = E[a_j^2] of the layer's input a this is the expected squared error of the layer's output, input channels
    taken as uncorrelated (the diagonal of GPTQ's Hessian). The absmax scale itself is always tried, so the error is
    never above its; every candidate is tried as it would be stored.

    Args:
        x: weight [out, in].
        importance: h [in], not negative; None weighs all columns alike.
        steps: candidates, evenly from ``shrink`` to ``grow`` times the absmax scale.
        refits: least-squares steps after the search.

    Returns:
        scale [out, groups], as stored.
    """
    if importance is not None:
        _check(importance, x)
    start = choose_qparams(x, spec).scale
    chosen = torch.empty_like(start)
    rows = max(1, CHUNK_ELEMENTS // x.shape[1])
    weights = None if importance is None else grouped(importance.to(x.device).unsqueeze(0), spec)
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        values = grouped(x[part], spec)
        widest = values.abs().amax(dim=-1) / spec.quant_max
        best, least = start[part], _error(values, start[part], weights, spec)
        for factor in torch.linspace(shrink, grow, steps).tolist():
            best, least = _better(values, round_scale(widest * factor, spec), best, least, weights, spec)
        for _ in range(refits):
            best, least = _better(values, _refit(values, best, weights, spec), best, least, weights, spec)
        chosen[part] = best
    return QParams(chosen)


def _better(
    x: Tensor, scale: Tensor, best: Tensor, least: Tensor, weights: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """For each group whichever of the two scales errs less, and its error."""
    error = _error(x, scale, weights, spec)
    better = error < least
    return torch.where(better, scale, best), torch.where(better, error, least)


def _refit(x: Tensor, scale: Tensor, weights: Tensor | None, spec: QuantSpec) -> Tensor:
    """The least-squares scale of each group for the codes that ``scale`` gives; all-zero codes get the floor."""
    codes = _codes(x, scale.to(torch.float32).unsqueeze(-1), spec)
    weighted = codes if weights is None else codes * weights
    return round_scale((weighted * x).sum(dim=-1) / (weighted * codes).sum(dim=-1).clamp(min=1e-30), spec)


def _codes(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    return (x / scale).round_().clamp_(spec.quant_min, spec.quant_max)


def _error(x: Tensor, scale: Tensor, weights: Tensor | None, spec: QuantSpec) -> Tensor:
    """The weighted squared error of each group, [out, groups]."""
    s = scale.to(torch.float32).unsqueeze(-1)
    difference = _codes(x, s, spec).mul_(s).sub_(x).square_()
    if weights is not None:
        difference.mul_(weights)
    return difference.sum(dim=-1)


def _check(importance: Tensor, x: Tensor) -> None:
    if importance.shape != x.shape[1:]:
        raise ModelError(
            f"importance of shape {list(importance.shape)} for a weight of shape {list(x.shape)}",
            rule="one number for each input column",
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ModelError("importance holds negative numbers, NaN or inf", rule="it is a mean of squares")
