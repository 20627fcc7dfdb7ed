"""`quantization_config` of a compressed-tensors checkpoint: which layer has which layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from qtrain.numerics.spec import QuantSpec


def quantization_config(
    layers: Mapping[str, QuantSpec], ignore: Collection[str], activation: QuantSpec | None = None
) -> dict[str, Any]:
    """The description that transformers and vLLM read.

    The commonest spec is the default of every ``Linear``; layers with another one are named one by one in a group of
    their own (an exact name goes before a class in both readers).

    Args:
        layers: module name to its spec.
        ignore: names of the linear modules that stay unquantized.
        activation: of the layers' inputs; weights are int8 then, whatever their bits.
    """
    (default, _), *others = Counter(layers.values()).most_common()
    # Named layers come first: the reader asks the groups in their order which modules they hold.
    groups = [_scheme(spec, [name for name, its in layers.items() if its == spec], activation) for spec, _ in others]
    groups.append(_scheme(default, ["Linear"], activation))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if activation is None else "int-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def _scheme(spec: QuantSpec, targets: list[str], activation: QuantSpec | None) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "group" if spec.group_size else "channel",
            "group_size": spec.group_size,
            "dynamic": False,
        },
        "input_activations": None if activation is None else _dynamic_inputs(activation),
        "output_activations": None,
    }


def _dynamic_inputs(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
