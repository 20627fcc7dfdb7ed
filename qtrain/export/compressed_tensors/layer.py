"""The tensors of one layer in the file, from its record."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import pack, pack_rows


def byte_tensors(record: LinearRecord, _: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer in bytes: weight int8 or float8_e4m3fn [out, in], weight_scale [out, groups] or [1]; of
    inputs with one static range input_scale [1] and, where they are asymmetric, input_zero_point [1].
    """
    whole = record.spec.granularity == "per_tensor"
    tensors = {"weight": record.codes, "weight_scale": record.scale.reshape(1) if whole else record.scale}
    if record.inputs is not None:
        tensors["input_scale"] = record.inputs.scale.reshape(1)
        if record.inputs.zero_point is not None:
            tensors["input_zero_point"] = record.inputs.zero_point.reshape(1)
    return tensors


def packed_tensors(record: LinearRecord, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer: weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape;
    of an asymmetric one weight_zero_point too, int32 [out * bits / 32, groups], packed along the rows.

    Args:
        dtype: of the checkpoint. Weights that transformers unpacks at once, as it has to with zero points, get the
            dtype of their scales, so those are stored in fp32 where the checkpoint is: the same numbers.
    """
    tensors = {
        "weight_packed": pack_rows(record.codes, record.spec.bits),
        "weight_scale": record.scale,
        "weight_shape": torch.tensor(record.codes.shape, dtype=torch.int64),
    }
    if record.zero_point is not None:
        tensors["weight_scale"] = record.scale.to(torch.promote_types(record.scale.dtype, dtype))
        tensors["weight_zero_point"] = pack(record.zero_point.t(), record.spec.bits).t().contiguous()
    return tensors
