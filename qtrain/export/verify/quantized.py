"""Directories of quantized linears read back; a format adds what its header claims and which tensors a layer has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qtrain.errors import ExportError
from qtrain.export.verify.stored import Stored
from qtrain.models.quantized.header import read_header
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.models.quantized.registry import INTEGERS
from qtrain.models.quantized.tensors import TensorFiles

Claims = Callable[[Mapping[str, Any], Mapping[str, nn.Linear]], Collection[str]]
"""The linears that consumers take for quantized by the header."""
Parts = Callable[[QuantizedLayer, Collection[str]], Collection[str]]
"""The parts that a layer has, given those that are there."""


def read_quantized(
    method: str,
    directory: Path,
    linears: Mapping[str, nn.Linear],
    *,
    claims: Claims,
    parts: Parts,
    header_is: Mapping[str, Any] | None = None,
    tells_symmetry: bool = True,
) -> Stored:
    """A directory in the layout ``method``.

    Args:
        header_is: what ``quantization_config`` must say beside what the tensors are read by.

    Raises:
        QtrainError: another method, or tensors that contradict the header.
    """
    header = read_header(directory) or {}
    for key, value in {"quant_method": method, **(header_is or {})}.items():
        if header.get(key) != value:
            raise ExportError(
                f"quantization_config.{key}={header.get(key)!r}",
                where=str(directory / "config.json"),
                rule=f"it is {value!r}: consumers choose how they read by it",
            )
    tensors = TensorFiles(directory)
    reading = INTEGERS.get(method)(tensors, header, linears)
    expected, there = set[str](), list(reading.tensors)
    for name, layer in reading.layers.items():
        own = [key.removeprefix(f"{name}.") for key in there if key.startswith(f"{name}.")]
        expected |= {f"{name}.{part}" for part in parts(layer, own)}
    return Stored(
        reading.layers,
        {name: partial(tensors.get, name) for name in tensors if name not in reading.tensors},
        claimed=claims(header, linears),
        surplus=sorted(reading.tensors - expected),
        tells_symmetry=tells_symmetry,
    )
