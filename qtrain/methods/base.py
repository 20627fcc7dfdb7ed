"""The weights that a method begins with: 16-bit ones, or the codes that model.path holds."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from qtrain.errors import ModelError
from qtrain.methods.config import MethodSection
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model
from qtrain.models.packed import load_packed
from qtrain.models.quantized.header import quant_method
from qtrain.models.source import find_model

KEPT = "checkpoint"
"""The ``method.init`` that keeps the codes of a quantized checkpoint."""


def load_base(section: ModelSection, method: MethodSection, dtype: torch.dtype) -> PreTrainedModel:
    """``model.path``, packed where ``method.init=checkpoint``; what is not quantized is in ``dtype``.

    Raises:
        ModelError: no codes to keep, or codes that another ``method.init`` would quantize a second time.
    """
    init = getattr(method, "init", None)
    source = find_model(section)
    if init == KEPT:
        directory = Path(source.location)
        if source.kind == "gguf" or (source.kind == "directory" and quant_method(directory) is None):
            raise ModelError(
                "method.init=checkpoint keeps the codes of a quantized checkpoint, and model.path holds 16-bit weights",
                where=source.location,
                fix="a GPTQ, AWQ or compressed-tensors directory as model.path, or method.init=gptq",
            )
        if source.kind == "hub":
            files = ["*.safetensors", "*.json"]
            directory = Path(snapshot_download(source.location, revision=section.revision, allow_patterns=files))
        return load_packed(directory, dtype, attention=section.attention)
    if init is not None and source.kind == "directory" and (found := quant_method(Path(source.location))):
        raise ModelError(
            f"model.path holds {found} codes, and method.init={init} chooses codes of 16-bit weights",
            where=source.location,
            rule="codes are not quantized a second time",
            fix="method.init=checkpoint keeps them",
        )
    return load_model(section, dtype)
