"""Which trained layers a compressed-tensors checkpoint can hold as they are."""

from __future__ import annotations

from collections.abc import Iterable

from qtrain.errors import ExportError
from qtrain.export.config import TrainedLayer
from qtrain.numerics.spec import QuantSpec

RULE = (
    "compressed-tensors holds weights by row or group: int2, int3, int4 or int8 alone, symmetric or not; symmetric "
    "int4 or int8 beside inputs in int8, symmetric, each token by its own extremes"
)
MERGED = "export.format=merged, which keeps the weights' levels as unpacked numbers"
NEAREST = {"binary": "int2", "ternary": "int2", "int2": "int4", "int3": "int4"}
"""Formats that have a place by those that have none; int8 of all others."""


def check_layers(layers: Iterable[TrainedLayer]) -> None:
    """Raise unless layers with these specs have a place, all of them in one layout.

    Raises:
        ExportError: with the nearest specs that have one.
    """
    activations: dict[QuantSpec | None, str] = {}
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
            activations.setdefault(activation, where)
    if layers and not activations:
        raise ExportError("no layer has integer weights", rule=RULE, fix=f"{MERGED}, or method.weight.format=int4")
    if len(activations) > 1:
        one, other = list(activations.items())[:2]
        raise ExportError(
            f"{one[1]} has {described(one[0])} inputs, {other[1]} has {described(other[0])} ones",
            rule="one layout for all layers: weights alone in words, or weights and inputs in bytes",
            fix=MERGED,
        )


def needed_changes(weight: QuantSpec | None, activation: QuantSpec | None) -> dict[str, str]:
    """Keys of `method.*` with the values that would give such a layer its place; empty where it has one."""
    changes: dict[str, str] = {}
    if weight is None:
        return {} if activation is None else {"weight.format": "int8"}
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
    if activation is not None:
        if activation.format != "int8":
            changes["activation.format"] = "int8"
        if not activation.symmetric:
            changes["activation.symmetric"] = "true"
        if activation.granularity != "per_token":
            changes["activation.range"] = "dynamic"
    return changes


def described(spec: QuantSpec | None) -> str:
    """A spec in words: ``int4 symmetric per_group(64)``."""
    if spec is None:
        return "unquantized"
    kind = "half-integer" if spec.mid_rise else "symmetric" if spec.symmetric else "asymmetric"
    size = f"({spec.group_size})" if spec.group_size else ""
    return f"{spec.format} {kind} {spec.granularity}{size}"
