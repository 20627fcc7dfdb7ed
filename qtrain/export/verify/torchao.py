"""torchao's tensors read back: the metadata of each says what it is, the header no more than how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from qtrain.export.verify.quantized import read_quantized
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.torchao import parts_of


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Integers and fp8 by ``qtrain.models.quantized.torchao``; a consumer puts together what the metadata describes."""
    stored = read_quantized(
        "torchao",
        directory,
        linears,
        claims=lambda header, linears: (),
        parts=lambda layer, there: [f"_weight_{part}" for part in parts_of(layer.spec)],
        header_is={"include_input_output_embeddings": False, "modules_to_not_convert": None},
        tells_symmetry=False,
    )
    return replace(stored, claimed=list(stored.layers))
