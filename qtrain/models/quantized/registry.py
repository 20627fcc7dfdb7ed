"""How quantized checkpoints are read, by their ``quant_method``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qtrain.models.quantized.layer import Reading
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.registry import Registry

Reader = Callable[[TensorFiles, Mapping[str, Any], Mapping[str, nn.Linear]], Reading]
Loader = Callable[..., PreTrainedModel]

INTEGERS: Registry[Reader] = Registry(
    "layout of integers",
    {
        "gptq": "qtrain.models.quantized.gptq:read",
        "awq": "qtrain.models.quantized.awq:read",
        "compressed-tensors": "qtrain.models.quantized.compressed_tensors:read",
        "hqq": "qtrain.models.quantized.hqq:read",
        "torchao": "qtrain.models.quantized.torchao:read",
        "qtrain": "qtrain.models.quantized.packed:read",
    },
)
"""Affine codes: w = (q - z) s. A new format is one file and a line here."""

CODEBOOKS: Registry[Loader] = Registry(
    "layout of codebooks",
    {
        "bitsandbytes": "qtrain.models.quantized.bitsandbytes:load",
        "aqlm": "qtrain.models.quantized.aqlm:load",
    },
)
"""Everything else: the layers of the library that made them, frozen."""
