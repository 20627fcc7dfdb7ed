"""What a checkpoint of a quantization-aware run cannot say itself: the rest is up to who serves it."""

from __future__ import annotations

from qtrain.methods.qat.config import QatOptions
from qtrain.modules.config import QuantizerSection
from qtrain.modules.kv.config import KVCacheSection

CACHE_FLAGS = {
    "int8": "int8_per_token_head",
    "int4": "int4_per_token_head",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
"""vLLM's ``--kv-cache-dtype`` for caches of that format; the integer ones hold a scale a token and head, after RoPE."""


def serving_notes(options: QatOptions) -> tuple[str, ...]:
    """A sentence for each thing that is no tensor of the checkpoint."""
    notes = []
    if options.activation is not None:
        notes.append(_inputs(options.activation))
    if options.kv_cache is not None:
        notes.append(cache_note(options.kv_cache))
    head = options.weight if options.head else None
    for name, section in (("the token embedding", options.embedding), ("lm_head", head)):
        if section is not None:
            notes.append(f"{name} was trained on {section.format} levels and is stored as unpacked numbers on them")
    return tuple(notes)


def _inputs(section: QuantizerSection) -> str:
    if section.range != "dynamic" or section.format != "int8" or not section.symmetric:
        return f"inputs of linear layers were trained in {section.format}, {section.range} range"
    ours, other = ("127.5", "vLLM's kernels: 127") if section.convention != "vllm" else ("127", "transformers: 127.5")
    return f"inputs of linear layers were trained in int8 with a scale of absmax / {ours} a token ({other})"


def cache_note(section: KVCacheSection) -> str:
    """What a directory without a word of keys and values leaves to who serves it."""
    kind = "symmetric" if section.symmetric else "asymmetric"
    trained = f"{section.format} {kind}, {section.shared}, {section.site}"
    if section.range != "dynamic":
        return (
            f"the KV cache was trained as {trained}, with {section.range} ranges; nothing of them is in this "
            "directory: export.format=compressed-tensors has a place for such ranges"
        )
    flag = CACHE_FLAGS.get(section.format)
    if flag is None:
        return f"the KV cache was trained as {trained}: vLLM has no --kv-cache-dtype for it"
    same = (section.site, section.shared, section.symmetric) == ("post_rope", "per_head", True)
    # vLLM turns int4 keys and values by a Hadamard matrix first.
    nearest = "" if same and flag == "int8_per_token_head" else " is the nearest"
    return (
        f"the KV cache was trained as {trained}; it is a run-time flag, and nothing of it is in this directory: "
        f"vllm serve --kv-cache-dtype {flag}{nearest}"
    )
