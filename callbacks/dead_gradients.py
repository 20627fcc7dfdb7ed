"""Weights that no gradient reaches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from qtrain.callbacks.layer_diagnostic import Figures, LayerDiagnostic
from qtrain.modules.quantizers import quantized_weights


class DeadGradients(LayerDiagnostic):
    """``dead_gradients``: share of each quantized weight whose gradient is exactly zero at this step.

    A range that clips too much, units that are never active, or a path that rounding has cut. Looked at before the
    step, for modules may drop gradients right after it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._found: Figures = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count zeros, if the step to come is one to look at; nothing is waited for."""
        if self.is_time(trainer, trainer.global_step + 1):
            dead = {}
            for name, layer, _ in quantized_weights(pl_module):
                weight = layer._parameters.get("weight_orig", layer._parameters.get("weight"))
                if isinstance(weight, nn.Parameter) and weight.grad is not None:
                    dead[name] = (weight.grad == 0).float().mean()
            self._found = {"dead_gradients": dead}

    def measure(self, pl_module: LightningModule) -> Figures:
        """What was counted before the step."""
        found, self._found = self._found, {}
        return found
