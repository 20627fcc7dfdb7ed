"""Unquantized checkpoints read back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from qtrain.errors import ExportError
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.tensors import TensorFiles


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Every tensor by its name.

    Raises:
        ExportError: config.json calls them quantized.
    """
    header = read_header(directory)
    if header is not None:
        raise ExportError(
            f"quantization_config.quant_method={header['quant_method']!r}",
            where=str(directory / "config.json"),
            rule="a merged checkpoint is unquantized, and a consumer must not take it for anything else",
        )
    tensors = TensorFiles(directory)
    return Stored({}, {name: partial(tensors.get, name) for name in tensors}, claimed=())
