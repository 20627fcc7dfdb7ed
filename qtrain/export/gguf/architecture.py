"""Models as llama.cpp knows them: its names of tensors, its order of rows, its metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap
from torch import Tensor
from transformers import PretrainedConfig

from qtrain.errors import ExportError


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        arch: llama.cpp's.
        interleaved: its RoPE turns neighbours (2 i, 2 i + 1) of a head, transformers' turns (i, i + d/2), so the rows
            of q and k change places.
    """

    arch: MODEL_ARCH
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, interleaved=False),
}
ROPE_FACTORS = "rope_freqs.weight"


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family of a model.

    Raises:
        ExportError: it has none here, or llama.cpp computes something else for it.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ExportError(
            f"model_type={config.model_type!r} has no place in this format",
            rule="GGUF is written for " + ", ".join(ARCHITECTURES),
            fix="export.format=merged, then llama.cpp's convert_hf_to_gguf.py",
        )
    if config.hidden_act != "silu":
        raise ExportError(f"hidden_act={config.hidden_act!r}", rule=f"llama.cpp computes {found.arch.name} with silu")
    return found


def tensor_name(names: TensorNameMap, name: str) -> str:
    """``blk.0.ffn_up.weight`` of ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        ExportError: llama.cpp knows no such tensor.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError("llama.cpp knows no such tensor", where=name, fix="export.format=merged")
    return found


def row_order(config: PretrainedConfig, name: str) -> Tensor | None:
    """Which of the checkpoint's rows stands where in the file, int64 [out]; None: as they are."""
    projection = name.split(".")[-2]
    if not architecture_of(config).interleaved or projection not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
    return interleaved_rows(heads, head_size(config))


def interleaved_rows(heads: int, size: int) -> Tensor:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head of d rows."""
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def head_size(config: PretrainedConfig) -> int:
    """Width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_metadata(writer: GGUFWriter, config: PretrainedConfig, rows: int) -> None:
    """The keys that llama.cpp builds its graph by.

    Args:
        rows: of the embedding.

    Raises:
        ExportError: a RoPE that llama.cpp has no key for.
    """
    size = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(rows)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ExportError(f"rope_type={kind!r}", rule="llama.cpp has default, linear, yarn and llama3 for these models")


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What Llama 3 divides each frequency by, fp32 [head size / 2]: 1 for short waves, ``factor`` for those longer than
    the context it was trained on, in between a blend; a tensor of the file. None for other kinds of RoPE.
    """
    rope: dict[str, Any] = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.to(torch.float32)


def notes_on(config: PretrainedConfig) -> list[str]:
    """What a reader of the file does differently."""
    notes = []
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        notes.append(f"RoPE is of type {kind}, which llama.cpp reads from the file and transformers does not")
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        notes.append("transformers builds Llama models without the biases that the file holds; llama.cpp adds them")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        notes.append(f"llama.cpp attends to the whole context: sliding_window={window} is not kept")
    return notes
