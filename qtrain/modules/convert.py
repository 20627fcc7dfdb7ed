"""Fake-quantized layers become plain ones again, with their weights on the levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.modules.quant_activation import PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import quantizers
from qtrain.modules.swap import plain_class


@torch.no_grad()
def convert(model: nn.Module) -> list[str]:
    """Turn ``model``, in place, into modules of torch alone: W becomes fq(W), adapters merged, in W's dtype.

    PACT becomes clip(x, 0, alpha) (signed: clip(x, -alpha, alpha)); what rounds activations is gone, for that is the
    part of whatever runs the model in integers.

    Returns:
        Names of the quantizers of activations that were dropped.
    """
    dropped = [name for name, quantizer in quantizers(model) if not quantizer.for_weight and quantizer.enabled]
    levels: dict[Tensor, nn.Parameter] = {}  # a tied weight is put on its levels once
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PactActivation):
            model.set_submodule(name, _clip(layer))
        elif isinstance(layer, (QuantLinear, QuantConv2d, QuantEmbedding)):
            weight = layer.weight
            if weight not in levels:
                levels[weight] = nn.Parameter(layer.quantized_weight().detach().to(weight.dtype), weight.requires_grad)
            _become_plain(layer, levels[weight])
    return dropped


def _become_plain(layer: QuantLinear | QuantConv2d | QuantEmbedding, weight: nn.Parameter) -> None:
    for key in ("weight_quantizer", "input_quantizer", "lora_scale", "lora_A", "lora_B"):
        if hasattr(layer, key):
            delattr(layer, key)
    for key in ("kernels", "byte_gradient"):
        vars(layer).pop(key, None)
    layer.__class__ = plain_class(layer)  # type: ignore[assignment]
    layer.weight = weight


def _clip(activation: PactActivation) -> nn.Module:
    quantizer = activation.quantizer
    alpha = getattr(quantizer, "alpha", None)
    if alpha is None:
        return nn.ReLU()
    bound = alpha.item()
    return nn.Hardtanh(-bound if quantizer.spec.symmetric else 0.0, bound)
