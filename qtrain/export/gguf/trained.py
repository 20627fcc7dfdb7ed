"""Which trained layers a GGUF file can hold as they are, and in which of ggml's block types.

A weight is w = l s with a whole number l = q - z, its level, and a scale. A block of 32 or 256 neighbours of a row has
one fp16 scale, so a scale that more weights share is written once a block: the same numbers, in a few more bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import MERGED, described
from qtrain.export.config import TrainedLayer
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

RULE = (
    "GGUF holds weights as whole multiples, -128 to 127, of scales that 32 (or 64, 96, ...) neighbours or a whole row "
    "share, and leaves inputs to llama.cpp, which rounds them to int8 in blocks of 32 by itself"
)


@dataclass(frozen=True)
class BlockType:
    """A block type of ggml, w = l d: ``size`` neighbours share d (fp16), and l is in ``low`` .. ``high``.

    Q4_1 adds a minimum: w = u d + m, u in 0 .. 15.
    """

    name: str
    size: int
    low: int
    high: int


TQ1_0 = BlockType("TQ1_0", 256, -1, 1)
TQ2_0 = BlockType("TQ2_0", 256, -1, 1)
Q4_0 = BlockType("Q4_0", 32, -8, 7)
Q4_1 = BlockType("Q4_1", 32, 0, 15)
Q8_0 = BlockType("Q8_0", 32, -128, 127)
BLOCK_TYPES = {kind.name: kind for kind in (TQ1_0, TQ2_0, Q4_0, Q4_1, Q8_0)}


def block_type(spec: QuantSpec, width: int | None = None, ternary: BlockType = TQ2_0) -> BlockType | None:
    """The smallest type that holds every level of a weight [out, width], whatever its scales; None where none does.

    Args:
        width: None before the model is known: of rows only that they can be cut into blocks.
        ternary: the type for levels -1, 0, 1.
    """
    levels, run = level_bounds(spec), neighbours(spec, width)
    if levels is None or run is None:
        return None
    kinds = [kind for kind in (ternary, Q4_0, Q8_0) if run % kind.size == 0]
    return next((kind for kind in kinds if kind.low <= levels[0] and levels[1] <= kind.high), None)


def may_have_minimum(spec: QuantSpec) -> bool:
    """Whether Q4_1 holds the layer if its minimum s (quant_min - z) is an fp16 number, in half of Q8_0's bytes."""
    return spec.format == "int4" and not spec.symmetric and (neighbours(spec, None) or 1) % Q4_1.size == 0


def nearest_type(spec: QuantSpec, width: int) -> BlockType | None:
    """What comes nearest to a spec that has no place; None where rows are no whole blocks."""
    if width % Q4_0.size:
        return None
    return Q8_0 if spec.bits > 4 else Q4_0 if spec.symmetric and not spec.mid_rise else Q4_1


def level_bounds(spec: QuantSpec) -> tuple[int, int] | None:
    """The lowest and the highest q - z; None where levels are no whole numbers."""
    if spec.is_float or spec.mid_rise:
        return None
    reach = spec.quant_max - spec.quant_min
    return (spec.quant_min, spec.quant_max) if spec.symmetric else (-reach, reach)


def neighbours(spec: QuantSpec, width: int | None) -> int | None:
    """How many weights of a row share a scale; None where they are not of one row."""
    if spec.granularity == "per_group":
        return spec.group_size
    return (width or TQ2_0.size) if spec.granularity in ("per_channel", "per_tensor") else None


def check_layers(layers: Iterable[TrainedLayer]) -> None:
    """Raise unless layers with these specs have a place.

    Raises:
        ExportError: with the nearest specs that have one.
    """
    for where, weight, activation in layers:
        if changes := needed_changes(weight, activation):
            words = " ".join(f"method.{key}={value}" for key, value in changes.items())
            raise ExportError(
                f"no place for {described(weight)} weights with {described(activation)} inputs",
                where=where,
                rule=RULE,
                fix=f"{MERGED}, or {words}; export.allow_requantize=true rounds again, with a loss",
            )


def needed_changes(weight: QuantSpec | None, activation: QuantSpec | None) -> dict[str, str]:
    """Keys of `method.*` with the values that would give such a layer its place; empty where it has one."""
    changes = {} if activation is None else {"activation": "null"}
    if weight is None or block_type(weight) is not None:
        return changes
    if weight.format not in INTEGER_BITS and weight.is_float:
        changes["weight.format"] = "int8"
    if weight.mid_rise:
        changes["weight.mid_rise"] = "false"
    if not weight.symmetric and weight.bits == 8:
        changes["weight.symmetric"] = "true"
    if weight.granularity not in ("per_channel", "per_tensor", "per_group"):
        changes["weight.granularity"] = "per_group"
    if (neighbours(weight, None) or 1) % Q4_0.size:
        changes["weight.group_size"] = "32"
    return changes
