"""Which trained layers a format of integer weights alone can hold as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import MERGED, described
from qtrain.export.compressed_tensors.trained import needed_changes as changes_for_compressed_tensors
from qtrain.export.config import TrainedLayer
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec


@dataclass(frozen=True)
class Place:
    """What has a place in a format whose inputs stay in 16 bits.

    Attributes:
        rule: in words, for errors.
        bits: of a code.
        group_sizes: rows aside, which always have one.
        one_for_all: all layers have the same bits and group size.
    """

    rule: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    one_for_all: bool = False

    def check(self, layers: Iterable[TrainedLayer]) -> None:
        """Raise unless layers with these specs have a place.

        Raises:
            ExportError: with a format that keeps them, and the nearest specs that have a place here.
        """
        first: tuple[str, QuantSpec] | None = None
        layers = list(layers)
        for where, weight, activation in layers:
            if changes := self.needed_changes(weight, activation):
                words = " ".join(f"method.{key}={value}" for key, value in changes.items())
                raise ExportError(
                    f"no place for {described(weight)} weights with {described(activation)} inputs",
                    where=where,
                    rule=self.rule,
                    fix=f"{keeping(weight, activation)}, or {words}",
                )
            if weight is None:
                continue
            first = first or (where, weight)
            if self.one_for_all and (weight.bits, weight.group_size) != (first[1].bits, first[1].group_size):
                raise ExportError(
                    f"{first[0]} has {described(first[1])} weights, {where} has {described(weight)} ones",
                    rule=f"{self.rule}; one group size for all layers",
                    fix=keeping(weight, activation),
                )
        if layers and first is None:
            raise ExportError("no layer has integer weights", rule=self.rule, fix=MERGED)

    def needed_changes(self, weight: QuantSpec | None, activation: QuantSpec | None) -> dict[str, str]:
        """Keys of `method.*` with the values that would give such a layer its place; empty where it has one."""
        changes: dict[str, str] = {}
        if activation is not None:
            changes["activation"] = "null"
        if weight is None:
            return {} if activation is None else {"weight.format": f"int{self.bits[-1]}", **changes}
        if weight.format not in INTEGER_BITS or weight.bits not in self.bits:
            changes["weight.format"] = f"int{min((b for b in self.bits if b >= weight.bits), default=self.bits[-1])}"
        if weight.mid_rise:
            changes["weight.mid_rise"] = "false"
        if weight.granularity not in ("per_channel", "per_group"):
            changes["weight.granularity"] = "per_channel"
        if weight.granularity == "per_group" and weight.group_size not in self.group_sizes:
            # A smaller one, that divides whatever the other divides, if there is any.
            asked = weight.group_size or 0
            smaller = [size for size in self.group_sizes if asked % size == 0]
            changes["weight.group_size"] = str(max(smaller, default=self.group_sizes[0]))
        if weight.scale_dtype == "fp32":
            changes["weight.scale_dtype"] = "bf16"
        return changes


def keeping(weight: QuantSpec | None, activation: QuantSpec | None) -> str:
    """A format that holds such a layer as it is."""
    if changes_for_compressed_tensors(weight, activation):
        return MERGED
    return "export.format=compressed-tensors, which keeps them as they are"
