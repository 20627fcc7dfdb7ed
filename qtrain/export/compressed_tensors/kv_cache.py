"""Which ranges of keys and values a compressed-tensors checkpoint can hold, and how its header calls them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import described
from qtrain.modules.kv.config import KVCacheSection
from qtrain.numerics.spec import INTEGER_BITS, QuantSpec

RULE = (
    "compressed-tensors holds one static range for a layer's keys and one for its values: both in int2 .. int8 or both "
    "in fp8_e4m3, symmetric, over all codes, after RoPE, every token of them, with scales that bf16 holds"
)


def check_cache(section: KVCacheSection | None) -> None:
    """Raise unless what the cache needs of a checkpoint has a place; a dynamic range needs nothing.

    Raises:
        ExportError: with the nearest options that have one.
    """
    if section is None or section.range == "dynamic":
        return
    if changes := needed_changes(section):
        words = " ".join(f"method.kv_cache.{key}={value}" for key, value in changes.items())
        kept = described(section.key_section().spec(weight=False))
        raise ExportError(
            f"no place for {section.range} ranges of keys and values, {kept}, {section.site}",
            where="method.kv_cache",
            rule=RULE,
            fix=f"{words}, or method.kv_cache.range=dynamic, which needs nothing of a checkpoint, or "
            "export.format=merged, which leaves keys and values to who serves it",
        )


def needed_changes(section: KVCacheSection) -> dict[str, str]:
    """Keys of `method.kv_cache.*` with the values that would give a static range its place; empty where it has one."""
    changes: dict[str, str] = {}
    spec = cache_spec(section)
    if spec != section.value_section().spec(weight=False):
        changes |= {"key": "{}", "value": "{}"}
    if spec.format not in INTEGER_BITS and spec.format != "fp8_e4m3":
        changes["format"] = "fp8_e4m3"
    if not spec.symmetric:
        changes["symmetric"] = "true"
    if spec.mid_rise:
        changes["mid_rise"] = "false"
    if spec.format in INTEGER_BITS and spec.quant_min != -(1 << (spec.bits - 1)):
        changes["full_range"] = "true"
    if section.site != "post_rope":
        changes["site"] = "post_rope"
    if section.window:
        changes["residual"] = "0"
    if spec.scale_dtype != "bf16":
        changes["scale_dtype"] = "bf16"  # readers cast it to the checkpoint's dtype
    return changes


def cache_served_by_vllm(section: KVCacheSection) -> bool:
    """Whether vLLM loads a checkpoint with such ranges: its one cache with ranges of a checkpoint is fp8 (0.32)."""
    return cache_spec(section).is_float


def cache_notes(section: KVCacheSection, weights: Collection[QuantSpec]) -> tuple[str, ...]:
    """What who serves the checkpoint must know of keys and values."""
    spec = cache_spec(section)
    readers = "transformers and vLLM quantize" if spec.is_float else "transformers quantizes"
    notes = [
        f"keys and values were trained in {spec.format} with a {section.range} range for each layer's keys and values: "
        f"k_scale and v_scale are in this directory, and {readers} by them"
        + ("" if spec.is_float else "; vLLM refuses them, its caches of integers keep no range")
    ]
    if not all(weight.symmetric for weight in weights):
        # transformers 5.23 loads zero points of compressed-tensors 0.20 by dequantize=True alone, which ends early.
        notes.append(
            "where transformers unpacks weights at once, for their zero points, it leaves keys and values alone"
        )
    return tuple(notes)


def cache_spec(section: KVCacheSection) -> QuantSpec:
    """Of keys, and of values where ``needed_changes`` has none."""
    return section.key_section().spec(weight=False)


def cache_scheme(section: KVCacheSection) -> dict[str, Any]:
    """`kv_cache_scheme` of the header."""
    spec = cache_spec(section)
    return {
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
        "symmetric": spec.symmetric,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }
