"""Trained weights in bf16: 2 bytes each, and 2 of their gradient, where fp32 takes 4 and 4."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import quantizers


@torch.no_grad()
def keep_in_bf16(model: nn.Module, begun: Collection[str] = ()) -> None:
    """Keep the matrices of ``model`` in bf16, in place; norms, biases and ranges stay as they are.

    Args:
        begun: layers that begin at the codes of a start: a weight that rounding to bf16 takes to another code moves to
            the middle of its own. Levels beyond 128 steps from 0, which asymmetric int8 has, may be nearer to each
            other than numbers of bf16.
    """
    for name in begun:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear) and layer.weight_quantizer is not None
        wanted, qparams = layer.codes()
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
        middle = layer.weight_quantizer.dequantize(wanted, qparams, torch.bfloat16)
        layer.weight.copy_(torch.where(layer.codes()[0] == wanted, layer.weight, middle))
    ranges = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in ranges:
            parameter.data = parameter.data.to(torch.bfloat16)


def stored_line(model: nn.Module, asked: str) -> list[str]:
    """``stored  in bf16, 1.2 M in fp32``: where bf16 was asked for."""
    if asked != "bf16":
        return []
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    narrow = sum(parameter.numel() for parameter in own if parameter.dtype == torch.bfloat16)
    wide = sum(parameter.numel() for parameter in own) - narrow
    if not narrow:
        return ["stored      in fp32: products are made in fp32 here"]
    return [f"stored      {narrow:,} of them in bf16, rounded by chance; {wide:,} in fp32"]
