"""The mean range of a batch: one batch with outliers does not widen it for good."""

from __future__ import annotations

from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.numerics.observers.observer import Observer


class MovingAverage(Observer):
    """Exponential means of the batches' ends: low += momentum (min x - low), high alike; the first batch sets them.

    Symmetric: the larger magnitude of the two means. The only observer whose answer depends on the batches' order.
    Jacob 2018 (arXiv 1712.05877), section 3.1.
    """

    def __init__(
        self, *, bits: int, symmetric: bool, groups: int = 1, where: str | None = None, momentum: float = 0.01
    ) -> None:
        super().__init__(bits=bits, symmetric=symmetric, groups=groups, where=where)
        if not 0.0 < momentum <= 1.0:
            raise ConfigError(f"momentum={momentum}", where=where, rule="the weight of a new batch is in (0, 1]")
        self.momentum = momentum
        self.mean_low, self.mean_high = self.low, self.high

    def _take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        if self.count == 0:
            self.mean_low, self.mean_high = low, high
        else:
            self.mean_low = self.mean_low.lerp(low, self.momentum)
            self.mean_high = self.mean_high.lerp(high, self.momentum)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.mean_low, self.mean_high
