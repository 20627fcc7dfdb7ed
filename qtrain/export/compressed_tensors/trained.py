"""Which trained layers a compressed-tensors checkpoint can hold as they are."""

from __future__ import annotations

from collections.abc import Iterable

from qtrain.errors import ExportError
from qtrain.export.config import TrainedLayer
from qtrain.numerics.spec import QuantSpec

RULE = (
    "compressed-tensors holds weights by row or group: int2, int3, int4 or int8 alone, symmetric or not; symmetric "
    "int4 or int8 beside inputs in int8, by token (symmetric) or by one static range; fp8_e4m3 by row or tensor, alone "
    "or beside inputs in fp8_e4m3, by token or by one static range"
)
MERGED = "export.format=merged, which keeps the weights' levels as unpacked numbers"
NEAREST = {"binary": "int2", "ternary": "int2", "int2": "int4", "int3": "int4"}
"""Formats that have a place by those that have none; int8 of all others."""


def check_layers(layers: Iterable[TrainedLayer]) -> None:
    """Raise unless layers with these specs have a place, all of them in one layout.

    Raises:
        ExportError: with the nearest specs that have one.
    """
    activations: dict[tuple[bool, QuantSpec | None], str] = {}
    layers = list(layers)
    for where, weight, activation in layers:
        if changes := needed_changes(weight, activation):
            words = " ".join(f"method.{key}={value}" for key, value in changes.items())
            raise ExportError(
                f"no place for {described(weight)} weights with {described(activation)} inputs",
                where=where,
                rule=RULE,
                fix=f"{MERGED}, or {words}",
            )
        if weight is not None:
            activations.setdefault((weight.is_float, activation), where)
    if layers and not activations:
        raise ExportError("no layer has integer weights", rule=RULE, fix=f"{MERGED}, or method.weight.format=int4")
    if len(activations) > 1:
        ((one_float, one), where), ((other_float, other), elsewhere) = list(activations.items())[:2]
        kinds = (" in fp8" if one_float else "", " in fp8" if other_float else "")
        raise ExportError(
            f"{where} has {described(one)} inputs{kinds[0]}, {elsewhere} has {described(other)} ones{kinds[1]}",
            rule="one layout for all layers: weights alone in words, weights and inputs in bytes, or all of it in fp8",
            fix=MERGED,
        )


def needed_changes(weight: QuantSpec | None, activation: QuantSpec | None) -> dict[str, str]:
    """Keys of `method.*` with the values that would give such a layer its place; empty where it has one."""
    changes: dict[str, str] = {}
    if weight is None:
        return {} if activation is None else {"weight.format": "int8"}
    if weight.format == "fp8_e4m3":
        if weight.granularity not in ("per_channel", "per_tensor"):
            changes["weight.granularity"] = "per_channel"
        return changes if activation is None else changes | _input_changes(activation, "fp8_e4m3")
    held = ("int2", "int3", "int4", "int8") if activation is None else ("int4", "int8")
    if weight.format not in held:
        near = NEAREST.get(weight.format, "int8")
        changes["weight.format"] = near if near in held else "int4"
    if not weight.symmetric and activation is not None:
        changes["weight.symmetric"] = "true"
    if weight.mid_rise:
        changes["weight.mid_rise"] = "false"
    if weight.granularity not in ("per_channel", "per_group"):
        changes["weight.granularity"] = "per_channel"
    return changes if activation is None else changes | _input_changes(activation, "int8")


def _input_changes(activation: QuantSpec, format: str) -> dict[str, str]:
    """The same for inputs beside weights that want ``format``."""
    changes: dict[str, str] = {}
    if activation.format != format:
        changes["activation.format"] = format
    if activation.granularity == "per_tensor":  # a static range, in the file
        if format == "int8" and activation.symmetric and activation.quant_min != -128:
            changes["activation.convention"] = "compressed-tensors"
        if activation.scale_dtype != "bf16":
            changes["activation.scale_dtype"] = "bf16"  # readers cast it to the checkpoint's dtype
    elif activation.granularity != "per_token":
        changes["activation.range"] = "dynamic"
    elif not activation.symmetric:
        changes["activation.symmetric"] = "true"
    return changes


def described(spec: QuantSpec | None) -> str:
    """A spec in words: ``int4 symmetric per_group(64)``."""
    if spec is None:
        return "unquantized"
    kind = "half-integer" if spec.mid_rise else "symmetric" if spec.symmetric else "asymmetric"
    size = f"({spec.group_size})" if spec.group_size else ""
    return f"{spec.format} {kind} {spec.granularity}{size}"
