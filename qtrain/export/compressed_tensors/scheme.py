"""`quantization_config` of a compressed-tensors checkpoint: which layer has which layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from qtrain.export.compressed_tensors.kv_cache import cache_scheme
from qtrain.modules.kv.config import KVCacheSection
from qtrain.numerics.spec import QuantSpec


def quantization_config(
    layers: Mapping[str, QuantSpec],
    ignore: Collection[str],
    activation: QuantSpec | None = None,
    cache: KVCacheSection | None = None,
) -> dict[str, Any]:
    """The description that transformers and vLLM read.

    The commonest spec is the default of every ``Linear``; layers with another one are named one by one in a group of
    their own (an exact name goes before a class in both readers).

    Args:
        layers: module name to its spec.
        ignore: names of the linear modules that stay unquantized.
        activation: of the layers' inputs; integer weights lie in bytes then, whatever their bits.
        cache: keys and values whose ranges are in the checkpoint.
    """
    (default, _), *others = Counter(layers.values()).most_common()
    # Named layers come first: the reader asks the groups in their order which modules they hold.
    groups = [_scheme(spec, [name for name, its in layers.items() if its == spec], activation) for spec, _ in others]
    groups.append(_scheme(default, ["Linear"], activation))
    kept = {} if cache is None else {"kv_cache_scheme": cache_scheme(cache)}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if default.is_float else "int-quantized" if activation else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        **kept,
    }


def _scheme(spec: QuantSpec, targets: list[str], activation: QuantSpec | None) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": spec.bits,
            "type": "float" if spec.is_float else "int",
            "symmetric": spec.symmetric,
            "strategy": {"per_group": "group", "per_tensor": "tensor"}.get(spec.granularity, "channel"),
            "group_size": spec.group_size,
            "dynamic": False,
        },
        "input_activations": None if activation is None else _inputs(activation),
        "output_activations": None,
    }


def _inputs(spec: QuantSpec) -> dict[str, Any]:
    static = spec.granularity == "per_tensor"
    return {
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
        "symmetric": spec.symmetric,
        "strategy": "tensor" if static else "token",
        "group_size": None,
        "dynamic": not static,
    }
