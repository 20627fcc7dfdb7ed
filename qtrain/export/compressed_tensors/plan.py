"""Which layer gets which spec, decided from names and shapes before any weight is computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.trained import check_layers
from qtrain.modules.deployed import DeployedTensor
from qtrain.numerics.affine import largest_divisor
from qtrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Plan:
    """The layers of a model as they will be written.

    Attributes:
        specs: module name to spec, in checkpoint order.
        kept: linear layers that stay unquantized because they were asked to.
        fallbacks: widths that the asked group size does not divide, with what was taken instead.
        activation: of the layers' inputs, where the training quantized them; then weights are stored a byte each.
    """

    specs: dict[str, QuantSpec]
    kept: list[str]
    fallbacks: list[dict[str, Any]]
    activation: QuantSpec | None = None

    def group_sizes(self) -> dict[str, int]:
        """Group size, or ``row``, to the number of layers that have it."""
        return dict(Counter(str(spec.group_size or "row") for spec in self.specs.values()))

    def notes(self) -> list[str]:
        """What a user should hear, a sentence each."""
        return [
            f"group_size={gap['asked']} does not divide {gap['in_features']} inputs: {gap['layers']} layers have "
            + (f"groups of {gap['used']}" if gap["used"] > 0 else "one scale a row")
            for gap in self.fallbacks
        ]


def plan_layers(tensors: Iterable[DeployedTensor], options: CompressedTensorsOptions) -> Plan:
    """Specs for all linear layers that ``options.ignore`` does not name.

    Raises:
        ExportError: no layer is left.
    """
    specs: dict[str, QuantSpec] = {}
    kept: list[str] = []
    fallbacks: dict[int, dict[str, Any]] = {}
    for tensor in tensors:
        if not tensor.linear:
            continue
        name = module_name(tensor.name)
        if any(_matches(name, pattern) for pattern in options.ignore):
            kept.append(name)
            continue
        width = tensor.shape[1]
        size = None if options.group_size == -1 else largest_divisor(width, options.group_size)
        if options.group_size not in (-1, size):
            gap = {"in_features": width, "asked": options.group_size, "used": size or -1, "layers": 0}
            fallbacks.setdefault(width, gap)["layers"] += 1
        specs[name] = QuantSpec(
            format=f"int{options.bits}",
            granularity="per_group" if size else "per_channel",
            group_size=size,
            full_range=True,
            # Costs nothing (SmolLM2 int4 g32: perplexity 39.377, with fp16 scales 39.382), and no consumer's cast
            # to bf16 moves a weight.
            scale_dtype="bf16",
        )
    if not specs:
        raise ExportError(
            "no layer is left to quantize",
            where="export.ignore",
            rule="at least one linear layer is quantized",
            fix="export.format=merged writes unquantized weights",
        )
    return Plan(specs, kept, list(fallbacks.values()))


def plan_trained(tensors: Iterable[DeployedTensor]) -> Plan:
    """The specs that linear layers were trained with.

    Raises:
        ExportError: this layout cannot hold them, or there are none.
    """
    layers = {module_name(tensor.name): tensor for tensor in tensors if tensor.linear}
    check_layers((name, layer.spec, layer.activation) for name, layer in layers.items())
    if odd := [name for name, layer in layers.items() if not layer.whole_zero_points]:
        raise ExportError(
            f"zero points of {len(odd)} layers are no whole numbers, the first of {odd[0]}",
            rule="integer kernels subtract integers",
            fix="export.format=merged, or the 16-bit model with method.init=hqq, which rounds them",
        )
    specs = {name: layer.spec for name, layer in layers.items() if layer.spec is not None}
    kept = [name for name in layers if name not in specs]
    return Plan(specs, kept, [], layers[next(iter(specs))].activation)


def module_name(tensor_name: str) -> str:
    """``model.layers.0.mlp.up_proj`` of its weight's name."""
    return tensor_name.removesuffix(".weight")


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern
