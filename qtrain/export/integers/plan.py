"""Which layer gets which spec, decided from names and shapes before any weight is computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from qtrain.errors import ExportError
from qtrain.export.integers.config import IntegerOptions
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.numerics.affine import largest_divisor
from qtrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Plan:
    """The layers of a model as they will be written.

    Attributes:
        tensors: of the whole checkpoint, in its order.
        specs: module name to spec, in checkpoint order.
        kept: linear layers that stay unquantized because they were asked to.
        fallbacks: widths that the asked group size does not divide, with what was taken instead.
        activation: of the layers' inputs, where the training quantized them.
        trained: the specs are those of the training, and so will the codes be.
    """

    tensors: Sequence[DeployedTensor]
    specs: dict[str, QuantSpec]
    kept: list[str]
    fallbacks: list[dict[str, Any]]
    activation: QuantSpec | None = None
    trained: bool = False

    def layers(self) -> dict[str, DeployedTensor]:
        """The tensors that get codes, by module name."""
        named = {module_name(tensor.name): tensor for tensor in self.tensors}
        return {name: named[name] for name in self.specs}

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


def plan_model(model: DeployedModel, options: IntegerOptions, *, shared_sizes: Collection[int] = ()) -> Plan:
    """Specs of the training where there are any; else one for every linear layer that ``options.ignore`` leaves.

    Args:
        shared_sizes: group sizes of a format whose layers share one: where the asked one does not divide each of them,
            the next smaller one that does. Else each layer falls back alone.

    Raises:
        ExportError: the format cannot hold what was trained, or no layer is left.
    """
    tensors = list(model.tensors())
    return plan_trained(tensors, options) if model.trained_codes else _plan_chosen(tensors, options, shared_sizes)


def _plan_chosen(tensors: Sequence[DeployedTensor], options: IntegerOptions, shared_sizes: Collection[int]) -> Plan:
    widths: dict[str, int] = {}
    kept: list[str] = []
    for tensor in tensors:
        if tensor.linear:
            name = module_name(tensor.name)
            if any(_matches(name, pattern) for pattern in options.ignore):
                kept.append(name)
            else:
                widths[name] = tensor.shape[1]
    if not widths:
        raise ExportError(
            "no layer is left to quantize",
            where="export.ignore",
            rule="at least one linear layer is quantized",
            fix="export.format=merged writes unquantized weights",
        )
    asked, every = options.group_size, Counter(widths.values())
    sizes = _group_sizes(every, asked, shared_sizes)
    fallbacks = [
        {"in_features": width, "asked": asked, "used": sizes[width] or -1, "layers": layers}
        for width, layers in every.items()
        if asked != -1 and width % asked
    ]
    if shared_sizes:  # all have what the odd ones need
        fallbacks = [{**gap, "layers": len(widths)} for gap in fallbacks]
    specs: dict[str, QuantSpec] = {}
    for name, width in widths.items():
        size = sizes[width]
        specs[name] = QuantSpec(
            format=f"int{options.bits}",
            symmetric=options.symmetric,
            granularity="per_group" if size else "per_channel",
            group_size=size,
            full_range=options.symmetric,
            # Costs nothing (SmolLM2 int4 g32: perplexity 39.377, with fp16 scales 39.382), and no consumer's cast
            # to bf16 moves a weight.
            scale_dtype="bf16",
        )
    return Plan(tensors, specs, kept, fallbacks)


def _group_sizes(widths: Collection[int], asked: int, shared_sizes: Collection[int]) -> dict[int, int | None]:
    """The group size of each width; None is a whole row."""
    if asked == -1:
        return dict.fromkeys(widths)
    if not shared_sizes:
        return {width: largest_divisor(width, asked) for width in widths}
    fit = [size for size in shared_sizes if size <= asked and gcd(*widths) % size == 0]
    return dict.fromkeys(widths, max(fit, default=None))


def plan_trained(tensors: Sequence[DeployedTensor], options: IntegerOptions) -> Plan:
    """The specs that linear layers were trained with.

    Raises:
        ExportError: this format cannot hold them, or there are none.
    """
    layers = {module_name(tensor.name): tensor for tensor in tensors if tensor.linear}
    options.check_trained((name, layer.spec, layer.activation) for name, layer in layers.items())
    if odd := [name for name, layer in layers.items() if not layer.whole_zero_points]:
        raise ExportError(
            f"zero points of {len(odd)} layers are no whole numbers, the first of {odd[0]}",
            rule="integer kernels subtract integers",
            fix="export.format=merged, or the 16-bit model with method.init=hqq, which rounds them",
        )
    specs = {name: layer.spec for name, layer in layers.items() if layer.spec is not None}
    kept = [name for name in layers if name not in specs]
    return Plan(tensors, specs, kept, [], layers[next(iter(specs))].activation, trained=True)


def module_name(tensor_name: str) -> str:
    """``model.layers.0.mlp.up_proj`` of its weight's name."""
    return tensor_name.removesuffix(".weight")


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern
