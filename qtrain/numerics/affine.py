"""Affine quantization: scales, codes, and back.

Everything is computed from fp32 casts, whatever the input's dtype, so that eager, compiled and other-dtype
runs decide the same codes. Jacob 2018 (arXiv 1712.05877); ternary and binary scales are the mean magnitude (Ma 2024,
arXiv 2402.17764; Rastegari 2016, arXiv 1603.05279); fp8 as Llama 3 has it (arXiv 2407.21783).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.errors import ModelError
from qtrain.numerics.spec import QuantSpec

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SMALLEST_SCALE = 2.0**-14
"""fp16's smallest normal number; below it rounding is so coarse that the group's maximum would clamp."""
SMALLEST_FP32_SCALE = 2.0**-100
"""For scales that are never stored: far from where a quotient overflows."""
LARGEST_SCALE = 65280.0
"""The largest number that bf16 and fp16 both hold (255 * 2^8)."""


class QParams(NamedTuple):
    """What maps codes to numbers: x = (q - zero_point) * scale, or (q + 1/2) * scale where the spec is mid_rise.

    Attributes:
        scale: [rows, groups] in the spec's scale_dtype, all positive.
        zero_point: int8 [rows, groups] within the codes' range; None where the spec is symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """x as fp32 [rows, groups, numbers that share a scale]; a view where ``x`` is contiguous fp32.

    Raises:
        ModelError: nothing to share a scale, or a width that is no multiple of the group size.
    """
    size, divided = _sizes(x, spec)
    rows = 1 if spec.rows_share_scales else x.numel() // divided
    return x.to(torch.float32).reshape(rows, divided // size, size)


def grouped_size(x: Tensor, spec: QuantSpec) -> int:
    """How many numbers of x share a scale; errors as ``grouped``."""
    return _sizes(x, spec)[0]


def _sizes(x: Tensor, spec: QuantSpec) -> tuple[int, int]:
    """(numbers that share a scale, numbers that are divided into such groups)."""
    width = x.shape[-1] if x.ndim else 1
    size = {
        "per_tensor": x.numel(),
        "per_channel": x.numel() // x.shape[0] if x.ndim and x.shape[0] else width,
        "per_token": width,
    }.get(spec.granularity, spec.group_size)
    divided = x.numel() if spec.granularity == "per_block" else width if spec.granularity == "per_group" else size
    if not size or not divided or divided % size:
        raise ModelError(
            f"tensor of shape {list(x.shape)} with {spec.granularity}, group_size={size}",
            rule="group_size divides the last dimension (per_block: the number of elements)",
            fix=f"group_size={largest_divisor(divided, size)}" if divided and size else None,
        )
    return size, divided


def largest_divisor(columns: int, group_size: int) -> int | None:
    """The group size to use for a width: the asked one, else the largest of 128, 64, 32, 16 below it that divides.

    None where nothing divides: one scale a row is left.
    """
    for size in (group_size, 128, 64, 32, 16):
        if size <= group_size and columns % size == 0:
            return size
    return None


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """An fp32 scale as it will be stored: rounded to scale_dtype, no smaller than 2^-14 (fp32: 2^-100)."""
    return scale.clamp(min=smallest_scale(spec)).to(SCALE_DTYPES[spec.scale_dtype])


def smallest_scale(spec: QuantSpec) -> float:
    """2^-14, or 2^-100 for fp32."""
    return SMALLEST_FP32_SCALE if spec.scale_dtype == "fp32" else SMALLEST_SCALE


def round_zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """z = round(-low / s) + quant_min, clamped to the codes' range, so that 0 is a code; int8 [rows, groups]."""
    zero_point = (-low / scale.to(torch.float32)).round_().add_(spec.quant_min)
    return zero_point.clamp_(spec.quant_min, spec.quant_max).to(torch.int8)


def _over(numbers: Tensor, divisor: float) -> Tensor:
    """numbers / divisor, rounded once: on a GPU torch multiplies by the reciprocal of a Python number instead, and
    the same weight would have other scales there than on a CPU.
    """
    return numbers / torch.full((), divisor, dtype=numbers.dtype, device=numbers.device)


def qparams_of_bounds(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """What reaches from ``low`` to ``high``: s = max(|low|, |high|) / reach, or (high - low) / (2^b - 1) and z.

    An asymmetric range is widened to hold 0.

    Args:
        low, high: fp32 [rows, groups].
    """
    if spec.symmetric:
        return QParams(round_scale(_over(torch.maximum(low.abs(), high.abs()), spec.reach), spec))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = round_scale(_over(high - low, spec.quant_max - spec.quant_min), spec)
    return QParams(scale, round_zero_point(low, scale, spec))


def dynamic_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """What reaches each group's extremes (ternary, binary: its mean magnitude), unchecked: NaN stays NaN.

    A group of zeros gets the smallest scale, codes 0, and comes back as exact zeros.
    """
    groups = grouped(x, spec)
    if spec.format in ("ternary", "binary"):
        return QParams(round_scale(groups.abs().mean(dim=-1), spec))
    if spec.symmetric:
        return QParams(round_scale(_over(groups.abs().amax(dim=-1), spec.reach), spec))
    return qparams_of_bounds(groups.amin(dim=-1), groups.amax(dim=-1), spec)


def choose_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """``dynamic_qparams`` of a tensor that must be finite: for weights, once.

    Args:
        x: any float dtype, any strides.

    Returns:
        scale [rows, groups], as stored.

    Raises:
        ModelError: NaN, inf, or numbers so large that no fp16 scale reaches them.
    """
    qparams = dynamic_qparams(x, spec)
    limit = LARGEST_SCALE if spec.scale_dtype != "fp32" else float("inf")
    reachable = (qparams.scale <= limit) & qparams.scale.isfinite()
    if not x.is_meta and not bool(reachable.all()):
        rows = (~reachable).any(dim=1)
        raise ModelError(
            f"{int(rows.sum())} of {len(rows)} rows hold NaN, inf or numbers that no fp16 scale reaches "
            f"(the first is row {int(rows.nonzero()[0, 0])})",
            rule="weights to quantize are finite",
        )
    return qparams


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Codes of x's shape: q = clamp(round(x / s) + z, quant_min, quant_max), ties to even; int8, or float8 for fp8."""
    codes = level_codes(grouped(x, spec), qparams, spec)
    return codes.to(FLOAT_DTYPES.get(spec.format, torch.int8)).reshape(x.shape)


def level_codes(groups: Tensor, qparams: QParams, spec: QuantSpec, out: Tensor | None = None) -> Tensor:
    """Codes as fp32 [rows, groups, size], in a tensor of their own, or in ``out``."""
    scale = qparams.scale.to(torch.float32).unsqueeze(-1)
    if spec.convention == "torchao":
        scaled = torch.mul(groups, 1 / scale, out=out)
    else:
        scaled = torch.div(groups, scale, out=out)
    if spec.format == "binary":
        return torch.where(scaled >= 0, 1.0, -1.0)
    if spec.is_float:
        return scaled.clamp_(-spec.quant_max, spec.quant_max).to(FLOAT_DTYPES[spec.format]).to(torch.float32)
    if spec.mid_rise:
        scaled.sub_(0.5)
    scaled.round_()
    if qparams.zero_point is not None:
        scaled.add_(qparams.zero_point.to(torch.float32).unsqueeze(-1))
    return scaled.clamp_(spec.quant_min, spec.quant_max)


def level_numbers(codes: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Codes [rows, groups, size] (fp32, overwritten) as numbers: the scale cast to ``dtype``, one rounded product.

    The product of a code and a scale of 16 bits is exact in fp32, so the cast at the end is the only rounding.
    """
    if qparams.zero_point is not None:
        codes.sub_(qparams.zero_point.to(torch.float32).unsqueeze(-1))
    if spec.mid_rise:
        codes.add_(0.5)
    # A scale that is never stored is no consumer's to cast: fp32 throughout.
    scale = qparams.scale if spec.scale_dtype == "fp32" else qparams.scale.to(dtype)
    return codes.mul_(scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def dequantize(codes: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the codes' shape as a consumer that runs in ``dtype`` sees them."""
    own = grouped(codes, spec) if codes.dtype != torch.float32 else grouped(codes, spec).clone()
    return level_numbers(own, qparams, spec, dtype).reshape(codes.shape)
