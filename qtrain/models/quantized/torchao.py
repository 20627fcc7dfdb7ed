"""torchao's integer tensors in safetensors, with the metadata that puts them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from qtrain.errors import ModelError
from qtrain.models.quantized.layer import InputScheme, QuantizedLayer, Reading, linear_of, weight_spec
from qtrain.models.quantized.tensors import FLOATS, TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec

KINDS = ("IntxUnpackedToInt8Tensor", "Int8Tensor")
PARTS = ("qdata", "scale", "zero_point")
ASYMMETRIC_INPUT = QuantSpec("int8", False, "per_token", None, scale_dtype="fp32")
SYMMETRIC_INPUT = QuantSpec("int8", True, "per_token", None, convention="torchao", scale_dtype="fp32")


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``_weight_qdata`` int8 [out, in], ``_weight_scale`` and ``_weight_zero_point`` [out, groups].

    Raises:
        ModelError: other tensors of torchao's, tensors that contradict their description.
    """
    layers: dict[str, QuantizedLayer] = {}
    taken = set[str]()
    described = tensors.metadata()
    for name in (key.removesuffix("._weight_qdata") for key in tensors if key.endswith("._weight_qdata")):
        where = tensors.where(f"{name}._weight_qdata")
        kind, content = _description(described.get(f"{name}.weight"), name, where)
        linear = linear_of(linears, name)
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
        layers[name] = QuantizedLayer(spec, partial(_record, tensors, name, spec), _inputs(kind, content, name, where))
        taken |= {f"{name}._weight_{part}" for part in PARTS}
    return Reading(layers, frozenset(taken), "torchao's integers")


def _record(tensors: TensorFiles, name: str, spec: QuantSpec) -> LinearRecord:
    codes = tensors.get(f"{name}._weight_qdata")
    low, high = int(codes.min()), int(codes.max())
    if low < spec.quant_min or high > spec.quant_max:
        raise ModelError(
            f"codes from {low} to {high} in {name}",
            where=tensors.where(f"{name}._weight_qdata"),
            rule=f"{spec.format} codes lie within {spec.quant_min} .. {spec.quant_max}",
        )
    points = None if spec.symmetric else tensors.get(f"{name}._weight_zero_point")
    return LinearRecord(codes, tensors.scale(f"{name}._weight_scale"), points, spec)


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
    key = "act_quant_kwargs" if kind == "Int8Tensor" else "activation_quantization"
    how = content.get(key)
    if how is None:
        return None
    if how == "int8_asym_per_token":
        return InputScheme(ASYMMETRIC_INPUT)
    if isinstance(how, dict) and (how.get("_data") or {}).get("mapping_type", {}).get("_data") == "SYMMETRIC":
        return InputScheme(SYMMETRIC_INPUT)
    raise ModelError(f"{key}={how!r} of {name}", where=where, rule="int8 by token, symmetric or not, is read")
