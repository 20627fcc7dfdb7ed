"""Scales found by search: the least squared error in place of the largest number."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.affine import QParams, choose_qparams, grouped, round_scale
from qtrain.numerics.spec import QuantSpec

CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}
"""Weights tried at a time: two fp32 buffers of that size fit a CPU's second-level cache."""


def search_qparams(
    x: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    *,
    steps: int = 40,
    shrink: float = 0.6,
    grow: float = 1.15,
) -> QParams:
    """Scales with the least sum_j h_j (x_j - s q_j)^2 of each group, among fractions of the absmax scale.

    With h_j = E[a_j^2] of the layer's input a this is the expected squared error of the layer's output, input channels
    taken as uncorrelated (the diagonal of GPTQ's Hessian). The absmax scale itself is always tried, so the error is
    never above its; every candidate is tried as it would be stored.

    Args:
        x: weight [out, in].
        importance: h [in], not negative; None weighs all columns alike.
        steps: candidates, evenly from ``shrink`` to ``grow`` times the absmax scale.

    Returns:
        scale [out, groups], as stored.
    """
    if importance is not None:
        _check(importance, x)
    start = choose_qparams(x, spec).scale
    chosen = torch.empty_like(start)
    rows = max(1, CHUNK_ELEMENTS.get(x.device.type, 2**17) // x.shape[1])
    root = None
    if importance is not None:
        root = grouped(importance.to(x.device).unsqueeze(0), spec).sqrt()
    factors = torch.linspace(shrink, grow, steps).tolist()
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        chosen[part] = _search(grouped(x[part], spec), start[part], root, factors, spec)
    return QParams(chosen)


def _search(x: Tensor, start: Tensor, root: Tensor | None, factors: list[float], spec: QuantSpec) -> Tensor:
    widest = x.abs().amax(dim=-1) / spec.quant_max
    best, least = start, _error(x, start, root, spec)
    for factor in factors:
        scale = round_scale(widest * factor, spec)
        error = _error(x, scale, root, spec)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _error(x: Tensor, scale: Tensor, root: Tensor | None, spec: QuantSpec) -> Tensor:
    """The root of the weighted squared error of each group, [out, groups]."""
    s = scale.to(torch.float32).unsqueeze(-1)
    difference = (x / s).round_().clamp_(spec.quant_min, spec.quant_max).mul_(s).sub_(x)
    if root is not None:
        difference.mul_(root)
    norm: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return norm


def _check(importance: Tensor, x: Tensor) -> None:
    if importance.shape != x.shape[1:]:
        raise ModelError(
            f"importance of shape {list(importance.shape)} for a weight of shape {list(x.shape)}",
            rule="one number for each input column",
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ModelError("importance holds negative numbers, NaN or inf", rule="it is a mean of squares")
