"""One frozen layer as bitsandbytes saves it."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qtrain.errors import ExportError
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.frozen_linear import freeze_linear, frozen_kind

REPACKED = (
    "bitsandbytes repacked it for a CPU with AVX512-BF16 at its first evaluation, and rounded the scales of its blocks"
)


def frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers under a model's adapters that lie in codes of any kind, by their names in a plain model."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and not hasattr(module, "base_layer") and frozen_kind(module) is not None
    }


def tensors_of(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer with its weight [out, in] in codes; a bias is none of them.

    4 bits: ``weight`` u8 [out in / 2, 1], the first of two in the high nibble; ``weight.absmax`` of blocks, fp32 or
    with double quantization u8; ``weight.quant_map`` f32 [16]; ``weight.nested_absmax``, ``weight.nested_quant_map``;
    ``weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON in bytes. 8 bits: ``weight`` i8 [out, in], ``SCB`` f32
    [out], ``weight_format`` 0.

    Raises:
        ExportError: a weight that bitsandbytes has changed since it was quantized.
    """
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes, largest = layer.state.CB, layer.state.SCB
        assert codes is not None and largest is not None  # freeze_linear initialised them
        row_by_row = torch.tensor(0, dtype=torch.uint8)
        return {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": row_by_row}
    weight = layer.weight
    assert isinstance(weight, bnb.nn.Params4bit) and weight.quant_state is not None
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ExportError(
            REPACKED,
            where=name,
            fix="export before an evaluation, or with that layer's support_avx512bf16_for_cpu=False",
        )
    parts = weight.quant_state.as_dict(packed=True)
    return {f"{name}.weight": weight.data.view(torch.uint8), **{f"{name}.weight.{key}": parts[key] for key in parts}}


def quantized_anew(
    tensor: DeployedTensor, kind: str, *, double_quant: bool, compute_dtype: torch.dtype, dtype: torch.dtype
) -> nn.Module:
    """A merged weight, rounded to ``dtype``, as ``freeze_linear`` quantizes weights before a training.

    Raises:
        ExportError: it is not finite.
    """
    value = tensor.value().detach().to(dtype)
    if not bool(value.isfinite().all()):
        raise ExportError(f"NaN or inf as {dtype}", where=tensor.name, rule="exported weights are finite")
    linear = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(value, requires_grad=False)
    return freeze_linear(linear, kind, double_quant=double_quant, compute_dtype=compute_dtype, device=value.device)
