"""Affine quantization of weights: scales, codes, and back.

Everything is computed from fp32 casts, whatever the input's dtype, so that eager, compiled and other-dtype
runs decide the same codes. Jacob 2018 (arXiv 1712.05877), with z = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.spec import QuantSpec

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SMALLEST_SCALE = 2.0**-14
"""fp16's smallest normal number; below it rounding is so coarse that the group's maximum would clamp."""
LARGEST_SCALE = 65280.0
"""The largest number that bf16 and fp16 both hold (255 * 2^8)."""


class QParams(NamedTuple):
    """What maps codes to numbers: x = (q - zero_point) * scale.

    Attributes:
        scale: [out, groups] in the spec's scale_dtype, all positive.
        zero_point: None where the spec is symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """[out, in] as fp32 [out, groups, group_size]; a view where ``x`` is contiguous fp32.

    Raises:
        ModelError: not two-dimensional, no columns, or ``in`` no multiple of the group size.
    """
    if x.ndim != 2:
        raise ModelError(f"weight of shape {list(x.shape)}", rule="weights to quantize are [out, in]")
    columns = x.shape[1]
    size = columns if spec.granularity == "per_channel" else spec.group_size
    if not size or columns % size:
        raise ModelError(
            f"weight of shape {list(x.shape)} with group_size={size}",
            rule="group_size divides the second dimension",
            fix=f"group_size={largest_divisor(columns, size)}" if columns and size else None,
        )
    return x.to(torch.float32).reshape(x.shape[0], columns // size, size)


def largest_divisor(columns: int, group_size: int) -> int | None:
    """The group size to use for a width: the asked one, else the largest of 128, 64, 32, 16 below it that divides.

    None where nothing divides: one scale a row is left.
    """
    for size in (group_size, 128, 64, 32, 16):
        if size <= group_size and columns % size == 0:
            return size
    return None


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """An fp32 scale as it will be stored: rounded to scale_dtype, no smaller than 2^-14."""
    return scale.clamp(min=SMALLEST_SCALE).to(SCALE_DTYPES[spec.scale_dtype])


def choose_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """Scales that reach each group's largest number: s = max|x| / (2^(b-1) - 1).

    A group of zeros gets the smallest scale, codes 0, and comes back as exact zeros.

    Args:
        x: weight [out, in], any float dtype, any strides.

    Returns:
        scale [out, groups], as stored.

    Raises:
        ModelError: NaN, inf, or numbers so large that no fp16 scale reaches them.
    """
    scale = grouped(x, spec).abs().amax(dim=-1) / spec.quant_max
    reachable = scale <= LARGEST_SCALE
    if not scale.is_meta and not bool(reachable.all()):
        rows = (~reachable).any(dim=1)
        raise ModelError(
            f"{int(rows.sum())} of {len(rows)} rows hold NaN, inf or numbers that no fp16 scale reaches "
            f"(the first is row {int(rows.nonzero()[0, 0])})",
            rule="weights to quantize are finite",
        )
    return QParams(round_scale(scale, spec))


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Codes int8 [out, in]: q = clamp(round(x / s), quant_min, quant_max), ties to even."""
    scaled = grouped(x, spec) / qparams.scale.to(torch.float32).unsqueeze(-1)
    return scaled.round_().clamp_(spec.quant_min, spec.quant_max).to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers [out, in] as a consumer that runs in ``dtype`` sees them: the scale cast to it, one rounded product.

    The product of a code and a scale is exact in fp32, so the cast at the end is the only rounding.
    """
    scale = qparams.scale.to(dtype).to(torch.float32).unsqueeze(-1)
    return (grouped(codes, spec) * scale).to(dtype).reshape(codes.shape)
