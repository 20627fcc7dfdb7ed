"""Base and adapter as one weight."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from qtrain.modules.frozen_linear import dense_weight
from qtrain.numerics.row_parts import over_rows


def merged_weight(layer: nn.Module, base: torch.Tensor | None = None) -> torch.Tensor:
    """W + (lora_alpha / r) B A [out, in] in fp32; with DoRA its rows scaled to the trained magnitudes m [out].

    Args:
        layer: a PEFT LoRA linear, or any frozen linear (then W alone).
        base: a W to merge into instead of the layer's own, dequantized one.
    """
    inner = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = dense_weight(inner) if base is None else base
    if not isinstance(layer, LoraLayer):
        return weight.to(torch.float32)
    for name in layer.active_adapters:
        a, b = layer.lora_A[name], layer.lora_B[name]
        assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
        merged = _added(weight, a.weight.detach().float(), b.weight.detach().float(), layer.scaling[name])
        if name in layer.lora_magnitude_vector:
            dora = layer.lora_magnitude_vector[name]
            assert isinstance(dora, DoraLinearLayer)
            merged.mul_((dora.weight.detach().float() / merged.norm(dim=1))[:, None])
        weight = merged
    return weight


@torch.no_grad()
def _added(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling B A in fp32, where A and B lie."""
    merged = torch.empty(weight.shape, dtype=torch.float32, device=b.device)

    def add(rows: slice) -> None:
        torch.mm(b[rows], a, out=merged[rows]).mul_(scaling).add_(weight[rows].to(b.device))

    over_rows(add, merged)
    return merged
