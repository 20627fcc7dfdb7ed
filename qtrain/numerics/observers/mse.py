"""The range with the least expected squared error of the codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtrain.numerics.observers.histogram import Histogram

OCTAVES = 11
"""How far below the range seen an end is sought: 2^-11 of it is a bin of the default histogram."""
STEPS_SYMMETRIC = 64
STEPS_ASYMMETRIC = 4
"""Candidates an octave. Pairs of ends are (11 * 4)^2 candidates."""
REFINED = 4
"""Steps to either side in a refinement, each a quarter of those before."""
ROUNDS = 3


class MeanSquaredError(Histogram):
    """The range that minimises E (Q(x) - x)^2 over the histogram, x spread evenly inside each bin.

    Symmetric: s = high / (2^(b-1) - 1), codes clamped to +-(2^(b-1) - 1). Asymmetric: s = (high - low) / (2^b - 1),
    z = round(-low / s), codes clamped to 0 .. 2^b - 1. Ends are fractions of what was seen, the whole range among
    them: a geometric grid, then finer ones about the best.
    """

    def _range(self) -> tuple[Tensor, Tensor]:
        # On the CPU: a few thousand numbers, and CUDA has no deterministic sum over floats so far.
        width, counts = self.width().cpu().double(), self.counts.cpu()
        if self.symmetric:
            reach = self.reach().cpu() / width
            highs = [
                least_error_symmetric(n, float(r), 1 << (self.bits - 1)) for n, r in zip(counts, reach, strict=True)
            ]
            high = (torch.tensor(highs, dtype=torch.float64) * width).to(self.low)
            return -high, high
        seen = torch.stack([self.low, self.high], dim=1).cpu() / width[:, None]
        ends = torch.tensor(
            [
                least_error(n, float(low), float(high), 1 << self.bits)
                for n, (low, high) in zip(counts, seen, strict=True)
            ],
            dtype=torch.float64,
        )
        low, high = (ends * width[:, None]).to(self.low).unbind(1)
        return low, high


def least_error_symmetric(counts: Tensor, reach: float, levels: int) -> float:
    """The threshold in (0, reach] with the least error.

    Args:
        counts: [bins] int64, of |x|.
        reach: the largest |x|, in bins.
        levels: of a magnitude, 0 among them.
    """

    def error(power: Tensor) -> Tensor:
        step = reach * torch.exp2(power[:, 0]) / (levels - 1)
        return expected_error(counts, 0, torch.zeros_like(step), step, levels)

    (power,) = _search(error, ends=1, steps=STEPS_SYMMETRIC)
    return reach * math.exp2(power)


def least_error(counts: Tensor, low: float, high: float, levels: int) -> tuple[float, float]:
    """The ends (start, end) with low <= start <= 0 <= end <= high and the least error.

    Args:
        counts: [bins] int64, of x; zero lies in their middle.
        low, high: of x, in bins; an end on the other side of zero is taken as zero.
        levels: how many codes.
    """
    low, high = min(low, 0.0), max(high, 0.0)

    def error(power: Tensor) -> Tensor:
        start, end = low * torch.exp2(power[:, 0]), high * torch.exp2(power[:, 1])
        step = ((end - start) / (levels - 1)).clamp(min=1e-30)
        return expected_error(counts, -(len(counts) // 2), -torch.round(-start / step) * step, step, levels)

    start, end = _search(error, ends=2, steps=STEPS_ASYMMETRIC)
    return low * math.exp2(start), high * math.exp2(end)


def _search(error: Callable[[Tensor], Tensor], *, ends: int, steps: int) -> list[float]:
    """The powers of two, one an end, with the least error([candidates, ends]): 0, the whole range, to -OCTAVES."""
    power = torch.arange(0, -OCTAVES * steps, -1, dtype=torch.float64) / steps
    candidates = [power] * ends
    for turn in range(ROUNDS + 1):
        grid = torch.cartesian_prod(*candidates).reshape(-1, ends)
        best = grid[error(grid).argmin()]
        pace = torch.arange(-REFINED, REFINED + 1, dtype=torch.float64) / (steps * REFINED ** (turn + 1))
        candidates = [(end + pace).clamp(max=0.0) for end in best]
    return [float(power) for power in best]


def expected_error(counts: Tensor, first: int, start: Tensor, step: Tensor, levels: int) -> Tensor:
    """Summed squared error of a uniform quantizer over a histogram whose numbers are spread evenly inside their bins.

    With F_j(x) the sum of u^j over the numbers u below x, known at the bins' edges and linear in u^(j+1) between them,
    it is F_2(all) - 2 sum_k l_k dF_1 + sum_k l_k^2 dF_0 between the midpoints of the levels l_k = start + k step:
    exact, and in O(levels) a candidate instead of O(bins).

    Args:
        counts: [bins] int64; bin k reaches from first + k to first + k + 1.
        start, step: [candidates] float64, lowest level and distance of levels, in bins.
        levels: how many.

    Returns:
        [candidates] float64, in squares of a bin.
    """
    n = counts.to(torch.float64)
    edge = torch.arange(first, first + len(n) + 1, dtype=torch.float64)
    below = [torch.nn.functional.pad((n * edge.pow(j + 1).diff() / (j + 1)).cumsum(0), (1, 0)) for j in range(3)]

    level = start[:, None] + torch.arange(levels) * step[:, None]
    middle = torch.nn.functional.pad((level[:, :-1] + level[:, 1:]) / 2, (1, 1))
    middle[:, 0], middle[:, -1] = edge[0], edge[-1]
    middle.clamp_(edge[0], edge[-1])
    cell = (middle.floor() - first).long().clamp_(max=len(n) - 1)
    inside, corner = n[cell], edge[cell]
    numbers = (below[0][cell] + inside * (middle - corner)).diff(dim=1)
    sums = (below[1][cell] + inside * (middle.square() - corner.square()) / 2).diff(dim=1)
    return below[2][-1] + (level * (level * numbers - 2 * sums)).sum(dim=1)
