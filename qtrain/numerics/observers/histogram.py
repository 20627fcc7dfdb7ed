"""Counts of what was seen, in bins that merge exactly when the range grows."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.numerics.observers.observer import Observer

SMALLEST_EXPONENT = -100
"""Ranges below 2^-100 are counted as if they were that wide: numbers of bins a unit must be normal in fp32."""


class Histogram(Observer):
    """A histogram of |x| (symmetric) or of x, for each group.

    The range is 2^e, the next power of two above max|x|, and the bins are w = 2^e / cells wide, so that the bin of a
    number, k = floor(x / w), has no rounding, and a doubled range merges bins in pairs: floor(k / 2) = floor(x / 2w).
    The counts are those of one histogram over all batches at once, whatever their order and sizes.

    Attributes:
        cells: bins from 0 to 2^e; between half of them and all lie below max|x|.
        first: number of the first bin: 0, or -cells where x has a sign.
        counts: [groups, cells - first] int64.
        exponent: [groups] int32, e.
    """

    def __init__(
        self, *, bits: int, symmetric: bool, groups: int = 1, where: str | None = None, bins: int = 2048
    ) -> None:
        """Nothing seen yet.

        Args:
            bins: at least so many lie between 0 and the largest magnitude; a power of two.

        Raises:
            ConfigError: bins is no power of two, or below 2^bits.
        """
        super().__init__(bits=bits, symmetric=symmetric, groups=groups, where=where)
        if bins < 1 << bits or bins & (bins - 1):
            raise ConfigError(
                f"bins={bins}",
                where=where,
                rule=f"a power of two, {1 << bits} or more for {bits} bits",
                fix="bins=2048",
            )
        self.cells = 2 * bins
        self.first = 0 if symmetric else -self.cells
        self.counts = torch.zeros(groups, self.cells - self.first, dtype=torch.int64)
        self.exponent = torch.full((groups,), SMALLEST_EXPONENT, dtype=torch.int32)

    def width(self) -> Tensor:
        """w of each group, [groups] fp32."""
        return power_of_two(self.exponent - self.cells.bit_length() + 1)

    def reach(self) -> Tensor:
        """max|x| of each group, [groups] fp32."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def _take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        reach = torch.maximum(low.abs(), high.abs())
        # frexp: reach = m 2^e with m in [1/2, 1), so that reach lies strictly inside; it calls the e of 0 0.
        needed = torch.where(reach > 0, torch.frexp(reach).exponent, SMALLEST_EXPONENT)
        self._grow(torch.maximum(self.exponent, needed))
        numbers = values.abs() if self.symmetric else values
        cell = torch.floor(numbers / self.width()[:, None]).to(torch.int32) - self.first
        cell += self.counts.shape[1] * torch.arange(self.groups, dtype=torch.int32, device=cell.device)[:, None]
        # Not in place: a batch of an evaluation under inference_mode may go before one of training.
        self.counts = self.counts + torch.bincount(cell.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _grow(self, exponent: Tensor) -> None:
        """Merge the bins of groups whose range doubled: once for each doubling."""
        # A shift of 31 takes every bin to number 0 or -1; one by 64 or more would be undefined.
        doublings = (exponent - self.exponent).clamp(max=31).to(torch.int64)
        if bool(doublings.any()):
            number = torch.arange(self.first, self.cells, device=self.counts.device)
            target = (number >> doublings[:, None]) - self.first
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, target, self.counts)
        self.exponent = exponent

    def _to(self, device: torch.device) -> None:
        super()._to(device)
        self.counts, self.exponent = self.counts.to(device), self.exponent.to(device)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e in fp32 from its bits, exact on every device; int32 e in -126 .. 127."""
    power: Tensor = ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    return power
