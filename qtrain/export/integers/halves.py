"""Scales in fp16, as formats that know no other dtype have them."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.modules.record import LinearRecord


def fp16_scales(name: str, record: LinearRecord) -> Tensor:
    """The layer's scales [out, groups] in fp16: the same numbers.

    Raises:
        ExportError: fp16 does not hold them.
    """
    halves = record.scale.to(torch.float16)
    moved = halves.to(torch.float32) != record.scale.to(torch.float32)
    if bool(moved.any()):
        row, group = (int(index) for index in moved.nonzero()[0])
        first = f"{record.scale[row, group].item():g} of row {row}, group {group}"
        raise ExportError(
            f"{int(moved.sum())} of {moved.numel()} scales are no fp16 numbers, first {first}",
            where=name,
            rule="scales are stored in fp16, with not another bit",
            fix="export.format=compressed-tensors keeps them in their own dtype; or train with "
            "method.weight.scale_dtype=bf16",
        )
    return halves
