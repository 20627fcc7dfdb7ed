"""The arithmetic of a model's fake-quantized linear layers: set for all of them, and said in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from qtrain.kernels.int8_linear import lacks_int8_product
from qtrain.kernels.int8_matmul import int_mm_is_exact, tensor_core_words
from qtrain.modules.kernel_keys import InputGradient, Kernels
from qtrain.modules.quant_linear import QuantLinear

try:
    from qtrain.kernels import code_rows, quantize_rows
except ImportError:  # Triton comes with torch where there is a GPU
    code_rows = quantize_rows = None  # type: ignore[assignment]

IN_CHUNKS = "head simulated where the loss takes it in chunks"
"""Which asks for its factors (``qtrain.modules.head``), not for its forward."""


def use_kernels(model: nn.Module, kernels: Kernels, input_gradient: InputGradient = "full") -> None:
    """Let every ``QuantLinear`` multiply this way from now on."""
    for layer in _layers(model):
        layer.kernels = kernels
        layer.byte_gradient = input_gradient == "int8"


def kernel_lines(model: nn.Module) -> list[str]:
    """``kernels  int8 products in 14 layers, ...``: what multiplies, what quantizes, and why not otherwise."""
    layers = list(_layers(model))
    if not layers:
        return []
    asked = layers[0].kernels
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    lacking = [lacks_int8_product(*layer.rules()) or (IN_CHUNKS if layer is head else None) for layer in layers]
    products = "simulated products"
    if asked == "int8":
        parts = [f"int8 products in {lacking.count(None)} layers ({_products(layers[0])}"]
        parts[0] += ", gradients of inputs too)" if layers[0].byte_gradient else ")"
        reasons = Counter(reason for reason in lacking if reason not in (None, IN_CHUNKS))
        parts += [f"simulated in {count}: {reason}" for reason, count in reasons.items()]
        parts += [IN_CHUNKS] * (IN_CHUNKS in lacking)
        products = ", ".join(parts)
    elif None in lacking:
        products += f" (method.kernels=int8 multiplies bytes in {lacking.count(None)} layers)"
    return [f"kernels     {products}; levels {_levels(layers, asked)}"]


def _products(layer: QuantLinear) -> str:
    if _on_gpu(layer) and code_rows is not None:
        return tensor_core_words(layer.weight.device)
    if layer.weight.device.type == "cpu" and not int_mm_is_exact():
        return "summed in float64, for bytes saturate on this CPU"
    return "torch's integer product"


def _levels(layers: list[QuantLinear], asked: Kernels) -> str:
    if asked == "plain":
        return "by plain PyTorch"
    if not _on_gpu(layers[0]):
        return "by plain PyTorch: one-pass kernels need a GPU"
    if quantize_rows is None:
        return "by plain PyTorch: triton is not installed"
    unknown: Counter[str] = Counter()
    for layer in layers:
        quantizer = layer.weight_quantizer
        if quantizer is not None and not quantize_rows.knows(quantizer.rule.key, layer.weight.shape):
            unknown[f"{quantizer.spec.format} {quantizer.spec.granularity} {list(layer.weight.shape)}"] += 1
    words = "".join(f", plain for {count} weights of {kind}" for kind, count in unknown.items())
    return f"by one-pass kernels{words}"


def _on_gpu(layer: QuantLinear) -> bool:
    return layer.weight.is_cuda and torch.version.cuda is not None


def _layers(model: nn.Module) -> Iterator[QuantLinear]:
    return (module for module in model.modules() if isinstance(module, QuantLinear))
