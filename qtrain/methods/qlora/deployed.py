"""A model under adapters as the plain checkpoint that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from qtrain.methods.qlora.layers import linear_layers
from qtrain.methods.qlora.merge import merged_rows, merged_weight
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.frozen_linear import frozen_kind
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quantizer import Quantizer


def deployed_tensors(model: PreTrainedModel, base: Mapping[str, torch.Tensor]) -> Iterator[DeployedTensor]:
    """Tensors by the names of the plain architecture, adapters merged.

    Args:
        base: weights by name, each in place of the model's own; where there is none, that is dequantized. They are
            looked up when they are computed with.
    """
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    linear = linear_layers(model)
    for name, module in model.named_modules():
        if ".base_layer" in name or ".lora_" in name or (tied and module is head) or isinstance(module, Quantizer):
            continue
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        for kind, tensor in inner.named_parameters(recurse=False):
            key = f"{name}.{kind}" if name else kind
            if kind == "weight" and name in linear and (module is not head or frozen_kind(inner)):
                shape = (int(inner.out_features), int(inner.in_features))  # type: ignore[arg-type]
                value, rows = partial(_merged, module, base, key), partial(_rows, module, base, key)
                yield DeployedTensor(key, shape, module is not head, value, rows)
            elif kind == "bias" or not isinstance(inner, PackedLinear):  # its ranges are in the weight
                yield DeployedTensor(key, tuple(tensor.shape), False, partial(_plain, tensor, base, key))
        if isinstance(inner, PackedLinear):
            continue
        for kind, buffer in inner.named_buffers(recurse=False):
            if kind not in inner._non_persistent_buffers_set:
                key = f"{name}.{kind}"
                yield DeployedTensor(key, tuple(buffer.shape), False, partial(_plain, buffer, base, key))


def _merged(module: nn.Module, base: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    return merged_weight(module, base.get(key))


def _rows(module: nn.Module, base: Mapping[str, torch.Tensor], key: str) -> Callable[[slice], torch.Tensor]:
    return merged_rows(module, base.get(key))


def _plain(tensor: torch.Tensor, base: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    return base.get(key, tensor).detach()
