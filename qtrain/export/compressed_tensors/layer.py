"""One linear layer: from its weight to its record, and from the record to the tensors of the file."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ExportError, ModelError
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.packing import pack
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.gptq import gptq_codes


def quantize_linear(
    tensor: DeployedTensor, spec: QuantSpec, scales: str = "mse", moment: Tensor | None = None
) -> LinearRecord:
    """Compute the weight and decide its codes.

    Args:
        scales: mse or absmax.
        moment: of the layer's input: E[x_j^2] [in] weighs the scale search; E[x x^T] [in, in] does that with its
            diagonal and has the codes decided by GPTQ; None: all columns alike, the nearest codes.

    Raises:
        ExportError: the weight is not finite, or beyond what scales reach.
    """
    weight = tensor.value().detach()
    hessian = moment if moment is not None and moment.ndim == 2 else None
    importance = moment if hessian is None else hessian.diagonal()
    try:
        qparams = search_qparams(weight, spec, importance) if scales == "mse" else choose_qparams(weight, spec)
        codes = quantize(weight, qparams, spec) if hessian is None else gptq_codes(weight, qparams, hessian, spec)
    except ModelError as error:
        raise ExportError(
            error.what,
            where=tensor.name,
            rule=error.rule,
            fix=f"export.ignore=[{tensor.name.removesuffix('.weight')}] leaves this layer in 16 bits",
        ) from error
    return LinearRecord(codes, *qparams, spec)


def byte_tensors(record: LinearRecord, _: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer whose inputs are quantized too: weight int8 [out, in], weight_scale [out, groups]."""
    return {"weight": record.codes, "weight_scale": record.scale}


def packed_tensors(record: LinearRecord, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer: weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape;
    of an asymmetric one weight_zero_point too, int32 [out * bits / 32, groups], packed along the rows.

    Args:
        dtype: of the checkpoint. Weights that transformers unpacks at once, as it has to with zero points, get the
            dtype of their scales, so those are stored in fp32 where the checkpoint is: the same numbers.
    """
    tensors = {
        "weight_packed": pack(record.codes, record.spec.bits),
        "weight_scale": record.scale,
        "weight_shape": torch.tensor(record.codes.shape, dtype=torch.int64),
    }
    if record.zero_point is not None:
        tensors["weight_scale"] = record.scale.to(torch.promote_types(record.scale.dtype, dtype))
        tensors["weight_zero_point"] = pack(record.zero_point.t(), record.spec.bits).t().contiguous()
    return tensors
