"""Which of many scales can be a group's best: a lower bound of the error of each, by one look-up a weight."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.numerics.affine import SCALE_DTYPES, smallest_scale
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

CELLS = 4096
"""Of [-largest, largest]: the table fits a core's cache. Of 21 candidates for int4 it leaves 5, twice as many 4.7."""
SIZES = range(32, 16385)
"""Of groups: in smaller ones the candidates outnumber the weights, in larger ones sums in fp32 blur the bounds."""
BLUR = 2.0**-8
"""How far, in cells, the fp32 number of a cell may be off: 3 roundings of numbers up to 4096."""
LANES = 16
"""Columns in multiples of so many: a quarter faster."""


def can_bound(values: Tensor, spec: QuantSpec) -> bool:
    """Whether ``lower_bounds`` are worth their time: symmetric integers of up to 4 bits on a CPU.

    Each further bit makes a code half as many cells wide.
    """
    plain = spec.symmetric and spec.format in INTEGER_BITS and not spec.mid_rise
    return plain and spec.bits <= 4 and values.device.type == "cpu" and values.shape[-1] in SIZES


def lower_bounds(
    values: Tensor, scales: Tensor, factors: tuple[float, ...], spec: QuantSpec, memory: tuple[Tensor, Tensor]
) -> Tensor:
    """What sum_j (x_j - fq(x_j))^2 cannot be below, [rows, groups, candidates]; 0 or NaN where nothing is known.

    With m the largest magnitude of a group and f a candidate's factor, s is about f m / reach, and the cell of x / m
    tells x / s up to the cell's width and the rounding of s. The least error inside is in a table, a row a cell and
    all candidates beside one another: their sums over a group are those of bags of embeddings.

    Args:
        values: fp32 [rows, groups, size], finite.
        scales: fp32 [rows, groups, candidates], rounded as they are stored.
        factors: of the candidates.
        memory: two tensors like ``values``, overwritten.
    """
    largest = torch.maximum(values.amax(dim=-1), values.amin(dim=-1).neg_())
    per_number = (CELLS / 2 / largest.clamp(min=1e-30)).unsqueeze(-1)
    numbers = torch.mul(values, per_number, out=memory[0]).add_(CELLS / 2)
    cells = memory[1].view(torch.int32).copy_(numbers)
    sums = F.embedding_bag(cells.flatten(0, 1), _least_errors(spec, factors), mode="sum").view(*largest.shape, -1)
    # A scale may also be the smallest that there is. Sums are in fp32, here and of the errors.
    known = scales.amin(dim=-1, keepdim=True) > smallest_scale(spec)
    known = known * (1 - 1e-4 - values.shape[-1] * 2.0**-23)
    return scales.square().mul_(sums[..., : len(factors)]).mul_(known)


@cache
def _least_errors(spec: QuantSpec, factors: tuple[float, ...]) -> Tensor:
    """The least (u - fq(u))^2, u = x / s, of any x in a cell and any s that rounding may make; [cells, columns]."""
    cell = torch.arange(CELLS + 1, dtype=torch.float64).unsqueeze(1)
    first, last = (cell - BLUR) * 2 / CELLS - 1, (cell + 1 + BLUR) * 2 / CELLS - 1
    rounding = torch.finfo(SCALE_DTYPES[spec.scale_dtype]).eps / 2 + 1e-6  # that of fp32 too
    reach = spec.reach / torch.tensor(factors, dtype=torch.float64)
    start = reach * torch.minimum(first / (1 - rounding), first / (1 + rounding))
    end = reach * torch.maximum(last / (1 - rounding), last / (1 + rounding))
    level = start.ceil().clamp(spec.quant_min, spec.quant_max)
    least = torch.minimum(_error(start, spec), _error(end, spec))  # between two levels it is a hill
    least.masked_fill_((start <= level) & (level <= end), 0.0)
    return F.pad(least, (0, -len(factors) % LANES)).to(torch.float32)


def _error(u: Tensor, spec: QuantSpec) -> Tensor:
    return (u - u.round().clamp_(spec.quant_min, spec.quant_max)).square()
