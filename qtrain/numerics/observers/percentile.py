"""The range that holds a given share of the values."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.numerics.observers.histogram import Histogram


class Percentile(Histogram):
    """Symmetric: the least high with at least ``percentile`` per cent of |x| <= high.

    Asymmetric: half of the rest is cut at each end. Answers lie at the outer edge of the quantile's bin, so they are
    never inside the quantile and less than one bin outside it; never outside what was seen.
    """

    def __init__(
        self,
        *,
        bits: int,
        symmetric: bool,
        groups: int = 1,
        where: str | None = None,
        bins: int = 2048,
        percentile: float = 99.99,
    ) -> None:
        super().__init__(bits=bits, symmetric=symmetric, groups=groups, where=where, bins=bins)
        if not 0.0 < percentile <= 100.0:
            raise ConfigError(f"percentile={percentile}", where=where, rule="a per cent in (0, 100]", fix="99.99")
        self.percentile = percentile

    def _range(self) -> tuple[Tensor, Tensor]:
        # The decimal as it was written: 99.99 / 100 as a binary fraction puts rank 99990 of 10^5 at 99991.
        share = Fraction(str(self.percentile)) / 100
        if not self.symmetric:
            share = (1 + share) / 2
        rank = -(-share.numerator * self.count // share.denominator)
        width = self.width()
        upper = (self._cell_of(rank, self.counts) + self.first + 1) * width
        if self.symmetric:
            high = torch.minimum(upper, self.reach())
            return -high, high
        lower = (self.cells - 1 - self._cell_of(rank, self.counts.flip(1))) * width
        return torch.maximum(lower, self.low), torch.minimum(upper, self.high)

    @staticmethod
    def _cell_of(rank: int, counts: Tensor) -> Tensor:
        """Index [groups] of the bin that holds the rank-th value (from 1) of [groups, bins], counted from the left."""
        return (counts.cumsum(1) < rank).sum(1)
