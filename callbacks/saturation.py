"""Numbers at the end of their range."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.callbacks.layer_diagnostic import Figures, LayerDiagnostic
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantized_weights, quantizers, weight_of
from qtrain.numerics.spec import INTEGER_BITS


class Saturation(LayerDiagnostic):
    """``weight_saturation``, ``activation_saturation``: share of the codes that are the outermost ones.

    For PACT the upper end alone: the lower one is where a ReLU would give zero. Activations are those of the last batch
    of the step. Only integer formats have ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the inputs of quantizers in the batches of a step that will be looked at."""
        self._inputs = {}
        if not self.is_time(trainer, trainer.global_step + 1):
            return
        owners = {part.input_quantizer: part for part in pl_module.modules() if isinstance(part, QuantLinear)}
        for name, quantizer in quantizers(pl_module):
            if not quantizer.for_weight and quantizer.spec.format in INTEGER_BITS:
                watched = owners.get(
                    quantizer, quantizer
                )  # a linear does not call its own: it quantizes in one function
                self._handles.append(watched.register_forward_pre_hook(self._watcher(name, quantizer)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching, and measure if it is time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def measure(self, pl_module: LightningModule) -> Figures:
        """Weights as they are now, activations as they were."""
        weights = {
            name: _share(weight_of(layer), quantizer)
            for name, layer, quantizer in quantized_weights(pl_module)
            if quantizer.ready and quantizer.spec.format in INTEGER_BITS
        }
        return {"weight_saturation": weights, "activation_saturation": self._inputs}

    def _watcher(self, name: str, quantizer: Quantizer) -> Any:
        def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if quantizer.ready and quantizer.enabled and quantizer.observer is None:
                self._inputs[name] = _share(inputs[0], quantizer)

        return watch


@torch.no_grad()
def _share(x: Tensor, quantizer: Quantizer) -> Tensor:
    codes, _ = quantizer.codes(x)
    outermost = codes == quantizer.spec.quant_max
    if quantizer.section.range != "pact" or quantizer.spec.symmetric:
        outermost |= codes == quantizer.spec.quant_min
    return outermost.float().mean()
