"""Base and adapter as one weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from qtrain.modules.frozen_linear import stored_weight
from qtrain.numerics.row_parts import all_rows


def merged_weight(layer: nn.Module, base: Tensor | None = None) -> Tensor:
    """W + (lora_alpha / r) B A [out, in] in fp32; with DoRA its rows scaled to the trained magnitudes m [out].

    Args:
        layer: a PEFT LoRA linear, or any frozen linear (then W alone).
        base: a W to merge into instead of the layer's own, dequantized one.
    """
    weight = _weight(layer, base)
    if not isinstance(layer, LoraLayer):
        return weight.to(torch.float32)
    return all_rows(merged_rows(layer, weight), weight.shape)


def merged_rows(layer: nn.Module, base: Tensor | None = None) -> Callable[[slice], Tensor]:
    """What computes some rows of ``merged_weight``, which is then never whole."""
    weight = _weight(layer, base)
    names = layer.active_adapters if isinstance(layer, LoraLayer) else []
    adapters = [_Adapter(layer, name) for name in names]

    @torch.no_grad()
    def some(rows: slice) -> Tensor:
        part = weight[rows]
        for adapter in adapters:
            part = adapter.added(part, rows)
        return part.to(torch.float32)

    return some


def _weight(layer: nn.Module, base: Tensor | None) -> Tensor:
    if base is not None:
        return base
    return stored_weight(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)


class _Adapter:
    """One adapter of a layer, in fp32."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        assert isinstance(layer, LoraLayer)
        a, b = layer.lora_A[name], layer.lora_B[name]
        assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
        self._a, self._b, self._scaling = a.weight.detach().float(), b.weight.detach().float(), layer.scaling[name]
        self._magnitude: Tensor | None = None
        if name in layer.lora_magnitude_vector:
            dora = layer.lora_magnitude_vector[name]
            assert isinstance(dora, DoraLinearLayer)
            self._magnitude = dora.weight.detach().float()

    def added(self, weight: Tensor, rows: slice) -> Tensor:
        """W + scaling B A of these rows in fp32, where A and B lie."""
        merged = torch.mm(self._b[rows], self._a).mul_(self._scaling).add_(weight.to(self._b.device))
        if self._magnitude is not None:
            merged.mul_((self._magnitude[rows] / merged.norm(dim=1))[:, None])
        return merged
