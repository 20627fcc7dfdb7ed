"""compressed-tensors read back: targets less the ignore list."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compressed_tensors.utils import match_targets
from torch import Tensor, nn

from qtrain.export.compressed_tensors.cache_scales import PARTS, scales_of
from qtrain.export.compressed_tensors.kv_cache import cache_scheme, check_cache
from qtrain.export.verify.kv_cache import StoredCache
from qtrain.export.verify.quantized import read_quantized
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.deployed import DeployedCache


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Words, bytes or fp8, by ``qtrain.models.quantized.compressed_tensors``."""
    stored = read_quantized(
        "compressed-tensors",
        directory,
        linears,
        claims=_claims,
        parts=_parts,
        header_is={"quantization_status": "compressed"},
    )
    tensors = TensorFiles(directory)
    scales = {name: partial(tensors.get, name) for name in tensors if name.rpartition(".")[2] in PARTS}
    scheme = (read_header(directory) or {}).get("kv_cache_scheme")
    return replace(
        stored,
        surplus=[name for name in stored.surplus if name not in scales],
        cache=StoredCache(scheme, scales, _expected_cache),
    )


def _expected_cache(cache: DeployedCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_cache(cache.section)
    return cache_scheme(cache.section), dict(scales_of(cache))


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
