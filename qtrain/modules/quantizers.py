"""The quantizers of a model, and the model without them or with those of a post-training baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.modules.quant_activation import PactActivation
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.rules import Dynamic


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every one inside, in the order of the model; a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    """(name, layer, weight quantizer) of every layer that has one; of layers that share it the first."""
    seen: set[Quantizer] = set()
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer) and quantizer not in seen:
            seen.add(quantizer)
            yield name, module, quantizer


def weight_of(layer: nn.Module) -> Tensor:
    """What a layer's weight quantizer is given: the weight, with adapters merged."""
    weight = layer.merged_weight() if isinstance(layer, QuantLinear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is quantized: the model's own weights and activations."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in quantizers(model)]
    try:
        for quantizer, _ in before:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


@contextmanager
def round_to_nearest(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Inside, every range is dynamic: absmax round-to-nearest of the same specs, the baseline without training.

    Args:
        weights: theirs too; False leaves them the ranges that they have.
    """
    chosen = [quantizer for _, quantizer in quantizers(model) if weights or not quantizer.for_weight]
    before = [(quantizer, vars(quantizer).copy()) for quantizer in chosen]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PactActivation):
                # PACT's own range clips below zero; a dynamic one would reach down to the smallest number.
                hooks.callback(module.register_forward_pre_hook(_relu).remove)
        try:
            for quantizer, _ in before:
                quantizer.section = quantizer.section.model_copy(update={"range": "dynamic", "bounds": None})
                quantizer.rule = Dynamic(quantizer.spec)
                quantizer.ready, quantizer.observer = True, None
            yield
        finally:
            for quantizer, own in before:
                for key in ("section", "rule", "ready", "observer"):
                    setattr(quantizer, key, own[key])


def _relu(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.relu(inputs[0]), *inputs[1:])
