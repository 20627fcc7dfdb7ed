"""GPTQ read back, its zero points strictly: symmetric codes have them too, and kernels subtract them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qtrain.errors import ExportError
from qtrain.export.verify.quantized import read_quantized
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BESIDE = "quantize_config.json"


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Words by ``qtrain.models.quantized.gptq``; ``quantize_config.json`` repeats the header.

    The reader takes symmetric codes in either version's zero points, as they are found in the wild. Here v1 stores
    them less one, v2 as they are, and what is off by one is another number.

    Raises:
        QtrainError: another layout, tensors that contradict the header, or two headers.
    """
    stored = read_quantized(
        "gptq", directory, linears, claims=_claims, parts=lambda layer, there: PARTS, header_is={"desc_act": False}
    )
    header = read_header(directory)
    assert header is not None  # read
    beside = directory / BESIDE
    if beside.is_file() and json.loads(beside.read_text(encoding="utf-8")) != header:
        raise ExportError(
            "it differs from quantization_config", where=str(beside), rule="it repeats what config.json says"
        )
    tensors, less = TensorFiles(directory), 1 if header.get("checkpoint_format") == "gptq" else 0
    layers = {
        name: replace(layer, load=partial(_strictly, layer, tensors, name, less))
        for name, layer in stored.layers.items()
    }
    return replace(stored, layers=layers)


def _strictly(layer: QuantizedLayer, tensors: TensorFiles, name: str, less: int) -> LinearRecord:
    record = layer.load()
    if record.zero_point is not None:
        return record
    bits = layer.spec.bits
    points: Tensor = unpack(tensors.get(f"{name}.qzeros"), bits, len(record.codes)).t().contiguous()
    points = (points + less + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)) if bits < 8 else points + less
    return replace(record, zero_point=points)


def _claims(header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Collection[str]:
    """Linears of the decoder less those that ``dynamic`` leaves out, and of those left the listed ones."""
    left_out = [pattern[2:] for pattern in header.get("dynamic") or {} if pattern.startswith("-:")]
    listed = {name for block in header.get("modules_in_block_to_quantize") or [] for name in block}
    return [
        name
        for name in linears
        if not any(re.match(pattern, name) for pattern in left_out)
        and (name in listed if listed else name != "lm_head" or header.get("lm_head"))
    ]
