"""Where learned ranges go."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from qtrain.callbacks.layer_diagnostic import Figures, LayerDiagnostic
from qtrain.modules.quantizers import quantizers


class ScaleDrift(LayerDiagnostic):
    """``scale_drift``: mean learned scale over its mean at the start; ``pact_alpha``: PACT's bounds themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scales; a run that goes on has its own."""
        super().on_train_start(trainer, pl_module)
        scales = _scales(pl_module)
        if scales and (trainer.global_step == 0 or not self._start):
            self._start = dict(zip(scales, torch.stack(list(scales.values())).tolist(), strict=True))

    def measure(self, pl_module: LightningModule) -> Figures:
        """Of all learned ranges."""
        ranges = {
            name: (quantizer.section.range, quantizer.range_tensors()[0]) for name, quantizer in quantizers(pl_module)
        }
        alphas = {
            name: bound.detach() for name, (kind, bound) in ranges.items() if kind == "pact" and bound is not None
        }
        drift = {name: one / self._start[name] for name, one in _scales(pl_module).items() if self._start.get(name)}
        return {"scale_drift": drift, "pact_alpha": alphas}

    def state_dict(self) -> dict[str, Any]:
        """The start."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The start of the run that goes on."""
        self._start = state_dict["start"]


def _scales(module: LightningModule) -> dict[str, Tensor]:
    return {
        name: quantizer.scale.detach().mean()
        for name, quantizer in quantizers(module)
        if quantizer.section.range == "learned" and quantizer.scale is not None
    }
