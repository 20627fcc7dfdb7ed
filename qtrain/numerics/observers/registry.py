"""The table of observers; their names can be checked without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtrain.registry import Registry

if TYPE_CHECKING:
    from qtrain.numerics.observers.observer import Observer

OBSERVERS: Registry[type[Observer]] = Registry(
    "observer",
    {
        "min_max": "qtrain.numerics.observers.min_max:MinMax",
        "moving_average": "qtrain.numerics.observers.moving_average:MovingAverage",
        "percentile": "qtrain.numerics.observers.percentile:Percentile",
        "mse": "qtrain.numerics.observers.mse:MeanSquaredError",
        "kl": "qtrain.numerics.observers.kl:KLDivergence",
    },
)
