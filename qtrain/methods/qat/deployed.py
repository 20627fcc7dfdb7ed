"""A fake-quantized model as the plain checkpoint that it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.methods.qat.serving import cache_note
from qtrain.modules.deployed import DeployedCache, DeployedTensor
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import CHILD
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.record import LinearRecord


def deployed_tensors(model: PreTrainedModel) -> Iterator[DeployedTensor]:
    """Tensors by the names of the plain architecture; quantized ones with their codes."""
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and (
        head is not None and head.weight is model.get_input_embeddings().weight
    )
    inside = {name for name, module in model.named_modules() if isinstance(module, Quantizer)}
    for name, module in model.named_modules():
        if name in inside or (tied and module is head):
            continue
        for kind, tensor in module.named_parameters(recurse=False):
            key = f"{name}.{kind}" if name else kind
            if kind in ("lora_A", "lora_B"):
                continue
            if kind == "weight" and isinstance(module, QuantLinear | QuantEmbedding):
                yield _quantized(key, module, module is head)
            elif kind == "weight" and isinstance(module, nn.Linear) and module is not head:
                yield DeployedTensor(key, tuple(tensor.shape), True, tensor.detach)
            else:
                yield DeployedTensor(key, tuple(tensor.shape), False, tensor.detach)
        for kind, buffer in module.named_buffers(recurse=False):
            if kind not in module._non_persistent_buffers_set:
                yield DeployedTensor(f"{name}.{kind}", tuple(buffer.shape), False, buffer.detach)


@torch.no_grad()
def deployed_cache(model: PreTrainedModel, section: KVCacheSection | None) -> DeployedCache | None:
    """The ranges of keys and values that were kept; None where each token has its own."""
    if section is None or section.range == "dynamic":
        return None
    ranges = {
        name.removesuffix(f".{CHILD}"): (module.key.stored(), module.value.stored())
        for name, module in model.named_modules()
        if isinstance(module, KVQuantizer)
    }
    return DeployedCache(section, ranges, cache_note(section))


def _quantized(key: str, module: QuantLinear | QuantEmbedding, is_head: bool) -> DeployedTensor:
    linear = isinstance(module, QuantLinear) and not is_head
    shape = tuple(module.weight.shape)
    if not linear or not isinstance(module, QuantLinear):
        return DeployedTensor(key, shape, False, partial(on_levels, module))
    codes = module.weight_quantizer is not None
    return DeployedTensor(
        key,
        shape,
        True,
        partial(on_levels, module),
        spec=module.weight_quantizer.spec if module.weight_quantizer is not None else None,
        record=partial(record_of, module) if codes else None,
        activation=module.input_quantizer.spec if module.input_quantizer is not None else None,
    )


@torch.no_grad()
def on_levels(module: QuantLinear | QuantEmbedding) -> Tensor:
    """The weight that is multiplied."""
    return module.quantized_weight().detach()


@torch.no_grad()
def record_of(module: QuantLinear) -> LinearRecord:
    """Codes and ranges as the last forward used them."""
    assert module.weight_quantizer is not None
    codes, qparams = module.codes()
    quantizer = module.input_quantizer
    inputs = None if quantizer is None or quantizer.section.range == "dynamic" else quantizer.stored()
    return LinearRecord(codes, *qparams, module.weight_quantizer.spec, inputs=inputs)
