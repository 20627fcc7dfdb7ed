"""torchao's integer and fp8 tensors in safetensors, with the metadata that puts them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import InputScheme, QuantizedLayer, Reading, linear_of, weight_spec
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import SMALLEST_FP32_SCALE
from qtrain.numerics.spec import Granularity, QuantSpec

KINDS = ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor")
PARTS = ("qdata", "scale", "zero_point")
ASYMMETRIC_INPUT = QuantSpec("int8", False, "per_token", None, scale_dtype="fp32")
SYMMETRIC_INPUT = QuantSpec("int8", True, "per_token", None, convention="torchao", scale_dtype="fp32")
FLOAT_INPUT = QuantSpec("fp8_e4m3", True, "per_token", None, scale_dtype="fp32")
SMALLEST_REACH = 448 * SMALLEST_FP32_SCALE
"""A lower bound of max|x| up to this is for tokens of zeros."""


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``_weight_qdata`` [out, in], ``_weight_scale`` and, of integers, ``_weight_zero_point``.

    Raises:
        ModelError: other tensors of torchao's, tensors that contradict their description.
    """
    layers: dict[str, QuantizedLayer] = {}
    taken = set[str]()
    described = tensors.metadata()
    for name in (key.removesuffix("._weight_qdata") for key in tensors if key.endswith("._weight_qdata")):
        where = tensors.where(f"{name}._weight_qdata")
        kind, content = _description(described.get(f"{name}.weight"), name, where)
        make = _float_layer if kind == "Float8Tensor" else _integer_layer
        layers[name] = make(tensors, name, linear_of(linears, name), kind, content)
        taken |= {f"{name}._weight_{part}" for part in parts_of(layers[name].spec)}
    return Reading(layers, frozenset(taken), "torchao's tensors")


def parts_of(spec: QuantSpec) -> tuple[str, ...]:
    """The parts of a weight's tensor: integers have zero points there, even where they are symmetric."""
    return PARTS[:2] if spec.is_float else PARTS


def _integer_layer(
    tensors: TensorFiles, name: str, linear: nn.Linear, kind: str, content: Mapping[str, Any]
) -> QuantizedLayer:
    """``_weight_qdata`` int8, ``_weight_scale`` and ``_weight_zero_point`` [out, groups]."""
    where = tensors.where(f"{name}._weight_qdata")
    k, n = linear.in_features, linear.out_features
    bits = 8 if kind == "Int8Tensor" else _bits(content, name, where)
    block = content.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or block[0] != 1 or block[1] < 1 or k % block[1]:
        raise ModelError(
            f"block_size={block!r} of {name}", where=where, rule=f"[1, GROUP], a divisor of {k}: groups along a row"
        )
    shape, what = [n, k // block[1]], f"a weight [{n}, {k}] in blocks of {block}"
    tensors.check(f"{name}._weight_qdata", [n, k], [torch.int8], what)
    tensors.check(f"{name}._weight_scale", shape, FLOATS, what)
    tensors.check(f"{name}._weight_zero_point", shape, [torch.int8], what)
    symmetric = not bool(tensors.get(f"{name}._weight_zero_point").any())
    scale_dtype = tensors.dtype(f"{name}._weight_scale")
    assert scale_dtype is not None  # checked
    group = None if block[1] == k else block[1]
    spec = weight_spec(bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
    return QuantizedLayer(spec, partial(_record, tensors, name, spec), _inputs(kind, content, name, where))


def _float_layer(
    tensors: TensorFiles, name: str, linear: nn.Linear, kind: str, content: Mapping[str, Any]
) -> QuantizedLayer:
    """``_weight_qdata`` float8_e4m3fn, ``_weight_scale`` fp32 [out, 1] or [1, 1]."""
    where = tensors.where(f"{name}._weight_qdata")
    k, n = linear.in_features, linear.out_features
    block = content.get("block_size")
    if block not in ([1, k], [n, k]):
        raise ModelError(
            f"block_size={block!r} of {name}", where=where, rule=f"[1, {k}] or [{n}, {k}]: a scale a row or a tensor"
        )
    granularity: Granularity = "per_channel" if block == [1, k] else "per_tensor"
    what = f"a weight [{n}, {k}] in blocks of {block}"
    tensors.check(f"{name}._weight_qdata", [n, k], [torch.float8_e4m3fn], what)
    tensors.check(f"{name}._weight_scale", [n // block[0], 1], [torch.float32], what)
    spec = QuantSpec("fp8_e4m3", True, granularity, None, scale_dtype="fp32")
    inputs = _inputs(kind, content, name, where)
    if inputs is not None and (granularity == "per_tensor" or content.get("mm_config") is None):
        raise ModelError(
            f"inputs by token beside weights {granularity}, mm_config={content.get('mm_config')!r} of {name}",
            where=where,
            rule="torchao multiplies rows by rows, as mm_config says",
        )
    return QuantizedLayer(spec, partial(_record, tensors, name, spec), inputs)


def _record(tensors: TensorFiles, name: str, spec: QuantSpec) -> LinearRecord:
    codes = tensors.get(f"{name}._weight_qdata")
    if spec.is_float:
        return _float_record(tensors, name, codes, spec)
    low, high = int(codes.min()), int(codes.max())
    if low < spec.quant_min or high > spec.quant_max:
        raise ModelError(
            f"codes from {low} to {high} in {name}",
            where=tensors.where(f"{name}._weight_qdata"),
            rule=f"{spec.format} codes lie within {spec.quant_min} .. {spec.quant_max}",
        )
    points = None if spec.symmetric else tensors.get(f"{name}._weight_zero_point")
    return LinearRecord(codes, tensors.scale(f"{name}._weight_scale"), points, spec)


def _float_record(tensors: TensorFiles, name: str, codes: Tensor, spec: QuantSpec) -> LinearRecord:
    if not bool(codes.float().isfinite().all()):
        raise ModelError(
            f"NaN among the codes of {name}",
            where=tensors.where(f"{name}._weight_qdata"),
            rule="weights are numbers, and bytes 7F and FF are none",
        )
    return LinearRecord(codes, tensors.scale(f"{name}._weight_scale"), None, spec)


def _description(text: str | None, name: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        found = json.loads(text or "")
        kind, content = found["_type"], found["_data"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(
            f"{name}.weight is not described", where=where, rule="the file's metadata says which tensor it is"
        ) from None
    if kind not in KINDS or not isinstance(content, dict):
        raise ModelError(
            f"{name}.weight is a {kind}",
            where=where,
            rule=f"of torchao's tensors {' and '.join(KINDS)} are read",
            fix="start from the 16-bit model",
        )
    return kind, content


def _bits(content: Mapping[str, Any], name: str, where: str) -> int:
    target = (content.get("target_dtype") or {}).get("_data", "")
    bits = str(target).removeprefix("int")
    if not bits.isdigit() or not 2 <= int(bits) <= 8:
        raise ModelError(f"target_dtype={target!r} of {name}", where=where, rule="int2 .. int8 are read")
    return int(bits)


def _inputs(kind: str, content: Mapping[str, Any], name: str, where: str) -> InputScheme | None:
    key = "activation_quantization" if kind == "IntxUnpackedToInt8Tensor" else "act_quant_kwargs"
    how = content.get(key)
    if how is None:
        return None
    if how == "int8_asym_per_token":
        return InputScheme(ASYMMETRIC_INPUT)
    own = how.get("_data") if isinstance(how, dict) else None
    if isinstance(own, dict):
        if kind == "Int8Tensor" and own.get("mapping_type") == {"_type": "MappingType", "_data": "SYMMETRIC"}:
            return InputScheme(SYMMETRIC_INPUT)
        if kind == "Float8Tensor" and _rounds_rows(own):
            return InputScheme(FLOAT_INPUT)
    raise ModelError(
        f"{key}={how!r} of {name}", where=where, rule="inputs by token are read: int8, symmetric or not, or fp8_e4m3"
    )


def _rounds_rows(own: Mapping[str, Any]) -> bool:
    """Whether inputs are fp8_e4m3 with max|x| / 448 a token, whatever max|x| is: torchao can bound it on both sides."""
    granularity, low = own.get("granularity"), own.get("hp_value_lb")
    by_row = isinstance(granularity, dict) and granularity.get("_type") == "PerRow"
    unbounded = own.get("hp_value_ub") is None and (low is None or (isinstance(low, float) and low <= SMALLEST_REACH))
    return by_row and unbounded and own.get("float8_dtype") == {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
