"""Weights that swing between two codes, and an end to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qtrain.callbacks.layer_diagnostic import Figures, LayerDiagnostic
from qtrain.errors import ConfigError
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantized_weights, weight_of
from qtrain.numerics.spec import QuantSpec


@dataclass
class Swing:
    """What is remembered of the codes of one weight, each in its shape.

    Attributes:
        spec: that the codes belong to.
        codes: int8, at the last look.
        direction: int8, of each code's last change: -1, 0 (none yet) or 1.
        rate: fp16, f: running share of looks at which the code changed back.
        average: fp16, running average of the code; frozen: bool. Where weights may be frozen.
    """

    spec: QuantSpec
    codes: Tensor
    direction: Tensor
    rate: Tensor
    average: Tensor | None = None
    frozen: Tensor | None = None


class CodeFlips(LayerDiagnostic):
    """``code_flips``: share of codes that changed since the last look; ``oscillation``: mean of f over the weights.

    f^t = m o^t + (1 - m) f^(t-1), where o is 1 for a code that changed against the direction of its last change
    (Nagel 2022, arXiv 2203.08187, who looks at every step). Weights with f > ``freeze_above`` are frozen at their
    running-average code, ``frozen`` of them, for the rest of the training.

    Memory: 4 bytes a weight, 7 with freezing.

    Args:
        every_n_steps: between two looks at the codes.
        momentum: m.
        freeze_above: threshold of f; None freezes nothing. The paper's is 0.04 falling to 0.01, with a look each step.
    """

    def __init__(
        self, every_n_steps: int = 10, *, momentum: float = 0.01, freeze_above: float | None = None, **keys: Any
    ) -> None:
        super().__init__(every_n_steps, **keys)
        if not 0 < momentum <= 1:
            raise ConfigError(
                f"momentum={momentum}",
                where=type(self).__name__,
                rule="the weight of the last look in a running share: between 0 and 1",
                fix="momentum=0.01",
            )
        self.momentum, self.freeze_above = momentum, freeze_above
        self._swings: dict[str, Swing] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The codes that the first flips are counted from; those of a run that goes on are its own."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._swings = {}
        if not self._swings:
            self.measure(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look if it is time, and hold what is frozen."""
        stepped = trainer.global_step != self._last_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if stepped and self.freeze_above is not None:
            for name, layer, quantizer in quantized_weights(pl_module):
                if name in self._swings:
                    _hold(layer, quantizer, self._swings[name])

    @torch.no_grad()
    def measure(self, pl_module: LightningModule) -> Figures:
        """Compare with the last look; a weight whose format has changed begins anew."""
        flips: dict[str, Tensor] = {}
        rates: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        for name, layer, quantizer in quantized_weights(pl_module):
            if not quantizer.ready or quantizer.spec.is_float:
                continue
            codes, _ = quantizer.codes(weight_of(layer))
            swing = self._swings.get(name)
            if swing is None or swing.spec != quantizer.spec:
                self._swings[name] = self._new(codes, quantizer.spec)
                continue
            flips[name], rates[name] = self._compare(swing, codes), swing.rate.mean(dtype=torch.float32)
            if swing.frozen is not None:
                frozen[name] = swing.frozen.float().mean()
        found = {"code_flips": flips, "oscillation": rates}
        return found if self.freeze_above is None else {**found, "frozen": frozen}

    def state_dict(self) -> dict[str, Any]:
        """What is frozen goes on being so; without freezing there is nothing that training depends on."""
        if self.freeze_above is None:
            return {}
        return {name: {**vars(swing), "spec": swing.spec.to_dict()} for name, swing in self._swings.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the run that goes on."""
        self._swings = {
            name: Swing(**{**content, "spec": QuantSpec.from_dict(content["spec"])})
            for name, content in state_dict.items()
        }

    def _new(self, codes: Tensor, spec: QuantSpec) -> Swing:
        swing = Swing(spec, codes, torch.zeros_like(codes), torch.zeros_like(codes, dtype=torch.float16))
        if self.freeze_above is not None:
            swing.average = codes.to(torch.float16)
            swing.frozen = torch.zeros_like(codes, dtype=torch.bool)
        return swing

    def _compare(self, swing: Swing, codes: Tensor) -> Tensor:
        _move(swing, codes.device)
        # Differences of int8 codes reach 255.
        change = torch.sign(codes.to(torch.int16) - swing.codes.to(torch.int16)).to(torch.int8)
        changed = change != 0
        back = changed & (change == -swing.direction)
        swing.rate.lerp_(back.to(torch.float16), self.momentum)
        swing.direction = torch.where(changed, change, swing.direction)
        swing.codes = codes
        if self.freeze_above is not None:
            assert swing.average is not None and swing.frozen is not None
            swing.average = torch.where(swing.frozen, swing.average, swing.average.lerp(codes.half(), self.momentum))
            swing.frozen |= swing.rate > self.freeze_above
        return changed.float().mean()


def _move(swing: Swing, device: torch.device) -> None:
    """Loaded states are on the CPU."""
    for key, value in vars(swing).items():
        if isinstance(value, Tensor) and value.device != device:
            setattr(swing, key, value.to(device))


@torch.no_grad()
def _hold(layer: nn.Module, quantizer: Quantizer, swing: Swing) -> None:
    """Put frozen weights on the level of their code, wherever the step has moved them."""
    weight = layer._parameters.get("weight")
    adapted = isinstance(layer, QuantLinear) and layer.lora_A is not None
    if swing.frozen is None or swing.average is None or weight is None or adapted:
        return
    _move(swing, weight.device)
    level = quantizer.dequantize(swing.average.round().to(torch.int8), quantizer.qparams(weight), weight.dtype)
    weight.copy_(torch.where(swing.frozen, level, weight))
