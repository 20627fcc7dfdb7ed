"""Packed layers in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch

from qtrain.kernels.packed_linear import choose_tiles
from qtrain.modules.packed_linear import PackedLinear


def packed_lines(layers: Collection[PackedLinear]) -> list[str]:
    """What is packed to how many bytes, a fact a line."""
    kinds = Counter(_described(layer) for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(layer.stored_bytes() for layer in layers)
    return [
        *(f"packed      {count} layers, {kind}" for kind, count in kinds.items()),
        f"size        {size / 1e6:,.1f} MB, {8 * size / max(1, weights):.3f} bits a weight",
    ]


def kernel_line(layers: Collection[PackedLinear], asked: str) -> str:
    """Whose kernels unpack them where they lie."""
    device = next((layer.weight.device for layer in layers), torch.device("cpu"))
    _, kernels = choose_tiles(asked, device)
    return f"kernels     {kernels}"


def _described(layer: PackedLinear) -> str:
    spec = layer.spec
    size = f"({spec.group_size})" if spec.group_size else ""
    kind = "symmetric" if spec.symmetric else "asymmetric"
    kind += "" if layer.whole_zero_points else " with fractional zero points, which no integer kernel takes"
    inputs = f", inputs {layer.input_quantizer.extra_repr()}" if layer.input_quantizer is not None else ""
    return f"{spec.format} {kind}, {spec.granularity}{size}{inputs}"
