"""The arithmetic of a model's fake-quantized linear layers: set for all of them, and said in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.kernels.fp8_product import fp8_words, has_fp8
from qtrain.kernels.int8_matmul import int_mm_is_exact, tensor_core_words
from qtrain.modules.kernel_keys import AUTO, AUTO_ON_GPU, FP8, PRODUCTS, InputGradient, Kernels
from qtrain.modules.plain_levels import plain_levels
from qtrain.modules.quant_linear import QuantLinear

try:
    from qtrain.kernels import code_rows
except ImportError:  # Triton comes with torch where there is a GPU
    code_rows = None  # type: ignore[assignment]

NO_UNITS = "no fp8 units here"

IN_CHUNKS = "head simulated where the loss takes it in chunks"
"""Which asks for its factors (``qtrain.modules.head``), not for its forward."""


def use_kernels(model: nn.Module, kernels: Kernels | Literal["auto"], input_gradient: InputGradient = "full") -> None:
    """Let every ``QuantLinear`` multiply this way from now on; ``auto``: each by its specs and where it lies."""
    for layer in _layers(model):
        layer.kernels = _auto(layer) if kernels == "auto" else kernels
        layer.byte_gradient = input_gradient == "int8"


def kernel_lines(model: nn.Module) -> list[str]:
    """``kernels  int8 products in 14 layers, ...``: what multiplies, what quantizes, and why not otherwise."""
    layers = list(_layers(model))
    if not layers:
        return []
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    reasons: Counter[str] = Counter()
    parts = []
    for kind in PRODUCTS:
        asked = [layer for layer in layers if layer.kernels == kind]
        lacking = [layer.lacks_product(kind) or (IN_CHUNKS if layer is head else None) for layer in asked]
        reasons.update(reason for reason in lacking if reason is not None)
        count = lacking.count(None)
        if count or len(asked) == len(layers):
            parts.append(f"{kind} products in {count} layers ({_by(kind, asked[0])})")
    chunked = reasons.pop(IN_CHUNKS, 0)
    if parts or reasons:
        if rest := sum(layer.kernels not in PRODUCTS for layer in layers):
            reasons[NO_UNITS] += rest
        parts += [f"simulated in {count}: {reason}" for reason, count in reasons.items()]
        parts += [IN_CHUNKS] * bool(chunked)
    products = ", ".join(parts) or "simulated products" + _possible([layer for layer in layers if layer is not head])
    return [f"kernels     {products}; levels {_levels(model, layers)}"]


def _auto(layer: QuantLinear) -> Kernels:
    if _device(layer).type != "cuda":
        return AUTO
    if _of_fp8(layer):
        return FP8 if has_fp8(_device(layer)) else AUTO
    return AUTO_ON_GPU


def _by(kind: Kernels, layer: QuantLinear) -> str:
    """What multiplies such codes."""
    if kind == "fp8":
        return fp8_words(_device(layer))
    words = "torch's integer product"
    if _on_gpu(layer) and code_rows is not None:
        words = tensor_core_words(_device(layer))
    elif _device(layer).type == "cpu" and not int_mm_is_exact():
        words = "summed in float64, for bytes saturate on this CPU"
    return words + (", gradients of inputs too" if layer.byte_gradient else "")


def _possible(layers: Sequence[QuantLinear]) -> str:
    """The products of codes that there could be."""
    found = []
    if count := sum(layer.lacks_product("int8") is None for layer in layers):
        found.append(f"method.kernels=int8 multiplies bytes in {count} layers")
    if count := sum(layer.lacks_product("fp8") is None for layer in layers):
        without = _on_gpu(layers[0]) and not has_fp8(_device(layers[0]))
        found.append(f"{NO_UNITS} for {count} layers" if without else f"method.kernels=fp8: codes of {count} layers")
    return f" ({', '.join(found)})" if found else ""


def _levels(model: nn.Module, layers: Sequence[QuantLinear]) -> str:
    if layers[0].kernels == "plain":
        return "by plain PyTorch"
    if not _on_gpu(layers[0]):
        return "by plain PyTorch: one-pass kernels need a GPU"
    unknown = plain_levels(model, layers)
    if unknown is None:
        return "by plain PyTorch: triton is not installed"
    return "by one-pass kernels" + "".join(f", plain for {count} {kind}" for kind, count in unknown.items())


def _of_fp8(layer: QuantLinear) -> bool:
    sides = layer.weight_quantizer, layer.input_quantizer
    return all(quantizer is not None and quantizer.spec.is_float for quantizer in sides)


def _on_gpu(layer: QuantLinear) -> bool:
    return _device(layer).type == "cuda" and torch.version.cuda is not None


def _device(layer: QuantLinear) -> torch.device:
    return layer.weight.device


def _layers(model: nn.Module) -> Iterator[QuantLinear]:
    return (module for module in model.modules() if isinstance(module, QuantLinear))
