"""Which trained layers torchao's tensors can hold as they are."""

from __future__ import annotations

from collections.abc import Iterable

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import MERGED, described
from qtrain.export.config import TrainedLayer
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

RULE = (
    "torchao holds int2 .. int8 weights by row or group, symmetric or not; inputs as they are, or in int8, asymmetric, "
    "each token by its own extremes; beside int8 weights by row inputs may be symmetric, convention torchao or "
    "compressed-tensors; fp8_e4m3 weights by row or tensor alone, or by row beside inputs in fp8_e4m3 by token, scales "
    "of which are fp32"
)


def check_layers(layers: Iterable[TrainedLayer]) -> None:
    """Raise unless all layers with these specs have a place.

    Raises:
        ExportError: with the nearest spec that has one.
    """
    found = False
    for where, weight, activation in layers:
        if changes := needed_changes(weight, activation):
            words = " ".join(f"method.{key}={value}" for key, value in changes.items())
            raise ExportError(
                f"no place for {described(weight)} weights with {described(activation)} inputs",
                where=where,
                rule=RULE,
                fix=f"{MERGED}, or {words}",
            )
        found |= weight is not None
    if not found:
        raise ExportError("no layer has weights in codes", rule=RULE, fix=f"{MERGED}, or method.weight.format=int4")


def needed_changes(weight: QuantSpec | None, activation: QuantSpec | None) -> dict[str, str]:
    """Keys of `method.*` with the values that would give such a layer its place; empty where it has one."""
    changes: dict[str, str] = {}
    if weight is None:
        return {} if activation is None else {"weight.format": "fp8_e4m3" if activation.is_float else "int8"}
    if weight.is_float:
        return _float_changes(weight, activation)
    if weight.format not in INTEGER_BITS:
        changes["weight.format"] = "int2" if weight.format in ("ternary", "binary") else "int8"
    if weight.mid_rise:
        changes["weight.mid_rise"] = "false"
    if weight.granularity not in ("per_channel", "per_group"):
        changes["weight.granularity"] = "per_channel"
    if activation is None:
        return changes
    if activation.format != "int8":
        changes["activation.format"] = "int8"
    if activation.granularity != "per_token":
        changes["activation.range"] = "dynamic"
    if activation.symmetric and not _both_bytes(weight, activation):
        changes["activation.symmetric"] = "false"
    return changes


def _float_changes(weight: QuantSpec, activation: QuantSpec | None) -> dict[str, str]:
    """The same for weights in fp8: torch's product takes scales of rows on both sides, or of tensors on both."""
    changes: dict[str, str] = {}
    if weight.format != "fp8_e4m3":
        changes["weight.format"] = "fp8_e4m3"
    if weight.granularity not in ("per_channel", "per_tensor")[: 2 if activation is None else 1]:
        changes["weight.granularity"] = "per_channel"
    if activation is None:
        return changes
    if activation.format != "fp8_e4m3":
        changes["activation.format"] = "fp8_e4m3"
    if not activation.symmetric:
        changes["activation.symmetric"] = "true"
    if activation.convention != "vllm":
        changes["activation.convention"] = "vllm"
    if activation.granularity != "per_token":
        changes["activation.range"] = "dynamic"
    if activation.scale_dtype != "fp32":
        changes["activation.scale_dtype"] = "fp32"
    return changes


def _both_bytes(weight: QuantSpec, activation: QuantSpec) -> bool:
    """The layout of torchao's Int8Tensor: symmetric bytes by row times symmetric bytes by token."""
    by_row = weight.format == "int8" and weight.symmetric and weight.granularity == "per_channel"
    return by_row and activation.convention != "vllm"
