"""Llamas with random weights, straight on their device."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.shapes import Shape

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def random_model(shape: Shape, dtype: torch.dtype = DTYPE) -> LlamaForCausalLM:
    """Every weight its own."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return LlamaForCausalLM(LlamaConfig(**shape.config))
    finally:
        torch.set_default_dtype(torch.float32)


def repeated_model(shape: Shape) -> LlamaForCausalLM:
    """All layers share one layer's linear weights until each is quantized to codes of its own.

    So the 16-bit weights of 65B never exist: 1.6 GB do. For frozen bases alone.
    """
    model = random_model(replace(shape, layers=1))
    config, first = model.config, model.model.layers[0]
    shared = {id(it): it for it in (config, *(linear.weight for linear in _linears(first)))}
    for number in range(1, shape.layers):
        layer = deepcopy(first, dict(shared))
        layer.self_attn.layer_idx = number
        model.model.layers.append(layer)
    config.num_hidden_layers = shape.layers
    return model


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]
