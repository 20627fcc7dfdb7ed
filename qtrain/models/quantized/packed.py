"""Packed layers as qtrain itself writes them (``qtrain.models.packed.save_packed``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from qtrain.errors import ConfigError, ModelError
from qtrain.models.quantized.layer import InputScheme, QuantizedLayer, Reading, groups_of, linear_of
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.record import LinearRecord, Outliers
from qtrain.numerics.affine import SCALE_DTYPES, QParams
from qtrain.numerics.packing import unpack, unpack_rows, words_of
from qtrain.numerics.spec import QuantSpec

PARTS = ("weight", "scale", "zero_point", "outlier_index", "outlier_value", "input_scale", "input_zero_point")


def read(tensors: TensorFiles, header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Reading:
    """Layers with ``weight`` int32 [out, words], ``scale`` [out, groups], all zero points in one row of words, or
    fp32 [out, groups] where they are no whole numbers.

    Raises:
        ModelError: specs that are none, tensors that contradict them.
    """
    layers: dict[str, QuantizedLayer] = {}
    taken = set[str]()
    for group in header.get("layers", []):
        spec, inputs = _specs(group, str(tensors.directory))
        for name in group["names"]:
            linear = linear_of(linears, name)
            k, n = linear.in_features, linear.out_features
            shape = [n, groups_of(name, k, spec.group_size)]
            what = f"a weight [{n}, {k}] in {spec.format} by groups of {spec.group_size}"
            tensors.check(f"{name}.weight", [n, words_of(k, spec.bits)], [torch.int32], what)
            tensors.check(f"{name}.scale", shape, [SCALE_DTYPES[spec.scale_dtype]], what)
            whole = True
            if not spec.symmetric:
                points = f"{name}.zero_point"
                whole = points not in tensors or tensors.dtype(points) != torch.float32
                words = [1, words_of(shape[0] * shape[1], spec.bits)]
                tensors.check(points, words if whole else shape, [torch.int32, torch.float32], what)
            scheme = None if inputs is None else InputScheme(inputs, _input_range(tensors, name))
            beside = f"{name}.outlier_index"
            outliers = tensors.shape(beside)[0] if beside in tensors else 0
            layers[name] = QuantizedLayer(spec, partial(_record, tensors, name, spec, n, k), scheme, whole, outliers)
            taken |= {f"{name}.{part}" for part in PARTS} & set(tensors)
    return Reading(layers, frozenset(taken), "qtrain's packed integers")


def _record(tensors: TensorFiles, name: str, spec: QuantSpec, out: int, columns: int) -> LinearRecord:
    scale = tensors.scale(f"{name}.scale")
    zero_point = outliers = None
    if not spec.symmetric:
        zero_point = tensors.scale(f"{name}.zero_point")
        if not zero_point.is_floating_point():
            zero_point = unpack(zero_point, spec.bits, scale.numel()).view(scale.shape)
    if f"{name}.outlier_index" in tensors:
        index = tensors.get(f"{name}.outlier_index")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < out * columns:
            raise ModelError(
                f"{name}.outlier_index reaches outside of the weight", where=tensors.where(f"{name}.outlier_index")
            )
        outliers = Outliers(index, tensors.get(f"{name}.outlier_value"))
    codes = unpack_rows(tensors.get(f"{name}.weight"), spec.bits, columns)
    return LinearRecord(codes, scale, zero_point, spec, outliers)


def _input_range(tensors: TensorFiles, name: str) -> QParams | None:
    if f"{name}.input_scale" not in tensors:
        return None
    points = f"{name}.input_zero_point"
    return QParams(tensors.scale(f"{name}.input_scale"), tensors.get(points) if points in tensors else None)


def _specs(group: Any, where: str) -> tuple[QuantSpec, QuantSpec | None]:
    try:
        inputs = group["inputs"]
        return QuantSpec.from_dict(group["weight"]), None if inputs is None else QuantSpec.from_dict(inputs)
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"quantization_config.layers: {error}", where=where, rule="qtrain wrote it") from None
