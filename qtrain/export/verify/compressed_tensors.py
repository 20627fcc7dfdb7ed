"""compressed-tensors read back: targets less the ignore list."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.utils import match_targets
from torch import nn

from qtrain.export.verify.quantized import read_quantized
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.layer import QuantizedLayer


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Words, bytes or fp8, by ``qtrain.models.quantized.compressed_tensors``."""
    header_is = {"quantization_status": "compressed", "kv_cache_scheme": None}
    return read_quantized("compressed-tensors", directory, linears, claims=_claims, parts=_parts, header_is=header_is)


def _claims(header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Collection[str]:
    targets = [target for group in header["config_groups"].values() for target in group["targets"]]
    ignored = header.get("ignore") or []
    return [
        name
        for name, linear in linears.items()
        if match_targets(name, linear, targets) and not match_targets(name, linear, ignored)
    ]


def _parts(layer: QuantizedLayer, there: Collection[str]) -> Collection[str]:
    parts = ["weight_scale"]
    parts += ["weight_packed", "weight_shape"] if "weight_packed" in there else ["weight"]
    parts += [] if layer.spec.symmetric else ["weight_zero_point"]
    if layer.inputs is not None and layer.inputs.qparams is not None:
        parts += ["input_scale"] if layer.inputs.spec.symmetric else ["input_scale", "input_zero_point"]
    return parts
