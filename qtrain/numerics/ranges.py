"""Ranges found by search: the least squared error in place of the extremes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.affine import QParams, choose_qparams, grouped, level_codes, qparams_of_bounds, round_scale
from qtrain.numerics.row_parts import over_rows
from qtrain.numerics.spec import QuantSpec

SHRINK = {1: 0.2, 2: 0.2, 3: 0.4}
"""Where the search begins, as a share of the widest range: the fewer levels, the more clipping pays."""


@torch.no_grad()
def search_qparams(
    x: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    *,
    steps: int = 20,
    shrink: float | None = None,
    grow: float = 1.1,
    refits: int = 2,
) -> QParams:
    """Ranges with the least sum_j h_j (x_j - fq(x_j))^2 of each group: a search, then a descent.

    Fractions of the widest range are tried first; then, given the best codes, the least-squares scale
    s = sum h n x / sum h n^2 (n the level in units of s), and codes anew (20 candidates and 2 refits reach what 80
    candidates reach alone). With h_j = E[a_j^2] of the layer's input a this is the expected squared error of the
    layer's output, input channels taken as uncorrelated (the diagonal of GPTQ's Hessian). The widest range itself is
    always tried, so the error is never above its; every candidate is tried as it would be stored.

    Args:
        x: weight [out, in].
        importance: h [in], not negative; None weighs all columns alike.
        steps: candidates, evenly from ``shrink`` (0.7, for fewer than 4 bits less) to ``grow`` times the widest range.
        refits: least-squares steps after the search.

    Returns:
        scale [out, groups] and zero point, as stored.
    """
    if importance is not None:
        _check(importance, x)
    whole = spec.rows_share_scales
    weights = None if importance is None else importance.to(x.device, torch.float32)
    lowest = SHRINK.get(spec.bits, 0.7) if shrink is None else shrink
    factors = torch.linspace(lowest, grow, steps if lowest >= 0.7 else 2 * steps).tolist()

    def search(rows: slice) -> QParams:
        part = x[rows]
        if weights is None:
            heights = None
        else:
            # One row of weights serves all rows, unless several rows share a scale.
            shared = weights.unsqueeze(0) if not whole else weights.expand(part.shape)
            heights = grouped(shared.contiguous(), spec)
        return _search(grouped(part, spec), choose_qparams(part, spec), heights, spec, factors, refits)

    found = [search(slice(None))] if whole else over_rows(search, x)
    zero_points = [one.zero_point for one in found if one.zero_point is not None]
    return QParams(torch.cat([one.scale for one in found]), torch.cat(zero_points) if zero_points else None)


def _search(
    values: Tensor, widest: QParams, heights: Tensor | None, spec: QuantSpec, factors: Sequence[float], refits: int
) -> QParams:
    """The best of ``widest`` and fractions of it, then of that and least-squares scales, for each group alone."""
    buffer, product = torch.empty_like(values), torch.empty_like(values)
    low, high = values.amin(dim=-1), values.amax(dim=-1)
    # All fractions in one call: of a part that fits a cache, many small tensors cost as much as the large ones.
    each = torch.tensor(factors, dtype=torch.float32, device=values.device).view(-1, 1, 1)
    scales, points = qparams_of_bounds(low * each, high * each, spec)
    best, least = widest, _error(values, widest, heights, spec, buffer)
    for number, scale in enumerate(scales.unbind()):
        candidate = QParams(scale, None if points is None else points[number])
        best, least = _better(candidate, _error(values, candidate, heights, spec, buffer), best, least)
    for _ in range(refits):
        candidate = _refit(values, best, heights, spec, buffer, product)
        best, least = _better(candidate, _error(values, candidate, heights, spec, buffer), best, least)
    return best


def _better(candidate: QParams, error: Tensor, best: QParams, least: Tensor) -> tuple[QParams, Tensor]:
    """For each group whichever of the two errs less, and its error."""
    better = error < least
    scale, least = torch.where(better, candidate.scale, best.scale), torch.where(better, error, least)
    if candidate.zero_point is None or best.zero_point is None:
        return QParams(scale), least
    return QParams(scale, torch.where(better, candidate.zero_point, best.zero_point)), least


def _refit(
    x: Tensor, qparams: QParams, weights: Tensor | None, spec: QuantSpec, buffer: Tensor, product: Tensor
) -> QParams:
    """The least-squares scale of each group for its codes; all-zero levels get the smallest scale."""
    levels = _levels(x, qparams, spec, buffer)
    weighted = levels if weights is None else levels * weights
    above = torch.mul(weighted, x, out=product).sum(dim=-1)
    below = torch.mul(weighted, levels, out=product).sum(dim=-1)
    return QParams(round_scale(above / below.clamp(min=1e-30), spec), qparams.zero_point)


def _levels(x: Tensor, qparams: QParams, spec: QuantSpec, buffer: Tensor) -> Tensor:
    """fq(x) / s, written to ``buffer``."""
    levels = level_codes(x, qparams, spec, out=buffer)
    if qparams.zero_point is not None:
        levels.sub_(qparams.zero_point.to(torch.float32).unsqueeze(-1))
    return levels.add_(0.5) if spec.mid_rise else levels


def _error(x: Tensor, qparams: QParams, weights: Tensor | None, spec: QuantSpec, buffer: Tensor) -> Tensor:
    """The weighted squared error of each group, [rows, groups]."""
    scale = qparams.scale.to(torch.float32).unsqueeze(-1)
    levels = _levels(x, qparams, spec, buffer)
    difference = torch.addcmul(x, levels, scale, value=-1, out=buffer).square_()
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
