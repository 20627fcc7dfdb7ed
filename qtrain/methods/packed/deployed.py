"""A model of packed layers as the plain checkpoint that it becomes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quantizer import Quantizer


def deployed_tensors(model: PreTrainedModel) -> Iterator[DeployedTensor]:
    """Tensors by the names of the plain architecture; packed layers with their codes and scales as trained."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    inside = {name for name, module in model.named_modules() if isinstance(module, Quantizer)}
    for name, module in model.named_modules():
        if name in inside or (tied and module is head):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, PackedLinear):
            yield _packed(name, module, module is head)
        for kind, tensor in module.named_parameters(recurse=False):
            if isinstance(module, PackedLinear) and kind != "bias":
                continue
            linear = kind == "weight" and isinstance(module, nn.Linear) and module is not head
            yield DeployedTensor(prefix + kind, tuple(tensor.shape), linear, tensor.detach)
        if isinstance(module, PackedLinear):
            continue
        for kind, buffer in module.named_buffers(recurse=False):
            if kind not in module._non_persistent_buffers_set:
                yield DeployedTensor(prefix + kind, tuple(buffer.shape), False, buffer.detach)


def _packed(name: str, layer: PackedLinear, is_head: bool) -> DeployedTensor:
    activation = layer.input_quantizer
    return DeployedTensor(
        f"{name}.weight",
        (layer.out_features, layer.in_features),
        not is_head,
        layer.dense_weight,
        spec=None if is_head else layer.spec,
        record=None if is_head else layer.record,
        activation=None if activation is None or is_head else activation.spec,
        whole_zero_points=layer.whole_zero_points,
    )
