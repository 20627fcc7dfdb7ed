"""The whole range seen: nothing that was observed is clipped."""

from __future__ import annotations

from torch import Tensor

from qtrain.numerics.observers.observer import Observer


class MinMax(Observer):
    """low = min x, high = max x over all batches; symmetric: high = max|x|."""

    def _take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        pass

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high
