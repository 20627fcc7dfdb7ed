"""Quantization-aware training of an image classifier: its callback, and what the table at the end compares with."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from qtrain.callbacks.code_flips import CodeFlips
from qtrain.callbacks.layer_sqnr import LayerSQNR
from qtrain.callbacks.quantization_aware_training import QuantizationAwareTraining
from qtrain.callbacks.saturation import Saturation
from qtrain.callbacks.scale_drift import ScaleDrift
from qtrain.evaluation.recovery import AccuracyRecovery
from qtrain.methods.config import MethodSection
from qtrain.methods.qat.lines import described
from qtrain.modules.config import QuantizerSection
from qtrain.modules.quantizers import quantizers, round_to_nearest
from qtrain.vision.config import QatOptions
from qtrain.vision.datamodule import ImageData


def quantization(method: MethodSection) -> QuantizationAwareTraining | None:
    """The callback that ``method.*`` describes; None where nothing is quantized.

    Raises:
        ConfigError: a schedule that ends with other formats than it should.
    """
    if not isinstance(method, QatOptions):
        return None
    return QuantizationAwareTraining(
        weight=_given(method.weight),
        activation=_given(method.activation),
        pact=_given(method.pact),
        rules=method.rules,
        skip=method.skip,
        first_last=method.first_last,
        calibration_batches=method.calibration_batches,
        start_step=method.start_step,
        freeze_ranges_step=method.freeze_ranges_step,
        bits_schedule=method.bits_schedule,
        scale_lr=method.scale_lr,
    )


def diagnostics(every_n_steps: int) -> list[Callback]:
    """What the report shows layer by layer."""
    return [ScaleDrift(every_n_steps), Saturation(every_n_steps), LayerSQNR(every_n_steps), CodeFlips(every_n_steps)]


def untrained_accuracies(
    module: L.LightningModule, quantization: QuantizationAwareTraining, data: ImageData, arguments: dict[str, Any]
) -> dict[str, float]:
    """Test accuracy of the weights as they are, ``full``, and by absmax and rounding to nearest, ``ptq``.

    On the test images: whoever trained the weights may have trained on the others. ``module`` is quantized afterwards.

    Args:
        arguments: of the trainer.
    """
    trainer = L.Trainer(**{**arguments, "enable_progress_bar": False}, logger=False, enable_checkpointing=False)

    def accuracy() -> float:
        return float(trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"])

    full = accuracy()
    quantization.prepare(module)
    with round_to_nearest(module):
        return {"full": full, "ptq": accuracy()}


def quantization_lines(method: MethodSection, module: nn.Module) -> list[str]:
    """What is quantized to what, for the terminal."""
    if not isinstance(method, QatOptions):
        return []
    words = {
        "weights": described(method.weight, weight=True),
        "inputs": described(method.activation, weight=False),
        "ReLUs": described(method.pact, weight=False),
        "ends": f"{method.first_last}, the first and the last layer" if method.first_last else "",
    }
    ranges = sum(p.numel() for _, quantizer in quantizers(module) for p in quantizer.parameters(recurse=False))
    lines = [f"{name:<12}{text}" for name, text in words.items() if text]
    return [*lines, f"ranges      {ranges:,} of the parameters"] if ranges else lines


def recovery(untrained: dict[str, float], trained: float) -> AccuracyRecovery:
    """What training gave back; ``untrained`` is empty where it began with random weights."""
    return AccuracyRecovery(untrained.get("full"), untrained.get("ptq"), trained)


def _given(section: QuantizerSection | None) -> dict[str, Any] | None:
    # The format is said in any case: its default depends on what is quantized.
    return None if section is None else section.model_dump(exclude_unset=True) | {"format": section.format}
