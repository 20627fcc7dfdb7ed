"""Lightning callbacks, each a library function on a schedule: ``from qtrain.callbacks import Throughput``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain.callbacks.code_flips import CodeFlips
    from qtrain.callbacks.dead_gradients import DeadGradients
    from qtrain.callbacks.layer_sqnr import LayerSQNR
    from qtrain.callbacks.nan_guard import NanGuard
    from qtrain.callbacks.progress_lines import ProgressLines
    from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
    from qtrain.callbacks.samples import SampleGenerations
    from qtrain.callbacks.saturation import Saturation
    from qtrain.callbacks.scale_drift import ScaleDrift
    from qtrain.callbacks.scheduled_quantization import ScheduledQuantization
    from qtrain.callbacks.throughput import Throughput
    from qtrain.callbacks.trainable_checkpoint import TrainableCheckpoint

_HOMES = {
    "CodeFlips": "qtrain.callbacks.code_flips:CodeFlips",
    "DeadGradients": "qtrain.callbacks.dead_gradients:DeadGradients",
    "LayerSQNR": "qtrain.callbacks.layer_sqnr:LayerSQNR",
    "NanGuard": "qtrain.callbacks.nan_guard:NanGuard",
    "ProgressLines": "qtrain.callbacks.progress_lines:ProgressLines",
    "QuantizationAwareTraining": "qtrain.callbacks.quantization_aware_training:QuantizationAwareTraining",
    "SampleGenerations": "qtrain.callbacks.samples:SampleGenerations",
    "Saturation": "qtrain.callbacks.saturation:Saturation",
    "ScaleDrift": "qtrain.callbacks.scale_drift:ScaleDrift",
    "ScheduledQuantization": "qtrain.callbacks.scheduled_quantization:ScheduledQuantization",
    "Throughput": "qtrain.callbacks.throughput:Throughput",
    "TrainableCheckpoint": "qtrain.callbacks.trainable_checkpoint:TrainableCheckpoint",
}

__all__ = [
    "CodeFlips",
    "DeadGradients",
    "LayerSQNR",
    "NanGuard",
    "ProgressLines",
    "QuantizationAwareTraining",
    "SampleGenerations",
    "Saturation",
    "ScaleDrift",
    "ScheduledQuantization",
    "Throughput",
    "TrainableCheckpoint",
]


def __getattr__(name: str) -> Any:
    # Lazily, as in qtrain itself: one callback should not load what the others need.
    if name not in _HOMES:
        raise AttributeError(f"module 'qtrain.callbacks' has no attribute {name!r}")
    from qtrain.registry import resolve

    return resolve(_HOMES[name])
