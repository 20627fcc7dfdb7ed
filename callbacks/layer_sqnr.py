"""How much of each layer's weight is left on its levels."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from qtrain.callbacks.layer_diagnostic import Figures, LayerDiagnostic
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantized_weights, weight_of


class LayerSQNR(LayerDiagnostic):
    """``sqnr``: 10 log10(|W|^2 / |W - fq(W)|^2) in dB, for every quantized weight; 6 dB is one bit."""

    def measure(self, pl_module: LightningModule) -> Figures:
        """Ranges that are not there yet have none."""
        layers = quantized_weights(pl_module)
        return {
            "sqnr": {name: _sqnr(weight_of(layer), quantizer) for name, layer, quantizer in layers if quantizer.ready}
        }


@torch.no_grad()
def _sqnr(weight: Tensor, quantizer: Quantizer) -> Tensor:
    exact = weight.detach().to(torch.float32)
    error = exact - quantizer.dequantize(*quantizer.codes(weight))
    return 10 * torch.log10(exact.square().sum() / error.square().sum())
