"""Ranges of keys and values: what a directory holds of them, beside the run's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtrain.errors import ExportError, QtrainError
from qtrain.export.verify.count import Count
from qtrain.modules.deployed import DeployedCache


@dataclass(frozen=True)
class StoredCache:
    """What the format has a place for; of a directory without quantized keys and values both are empty.

    Attributes:
        scheme: what the header says.
        scales: of the files, by their names.
        expected: both, as a directory in this format holds them of a cache; errors where it has no place for it.
    """

    scheme: Mapping[str, Any] | None
    scales: Mapping[str, Callable[[], Tensor]]
    expected: Callable[[DeployedCache], tuple[Mapping[str, Any], Mapping[str, Tensor]]]


def compare_cache(
    stored: StoredCache, cache: DeployedCache | None, counted: Count
) -> tuple[list[QtrainError], list[QtrainError]]:
    """What is wrong with the header and with the names of tensors; scales that differ are counted in ``counted``."""
    scheme, scales = (None, {}) if cache is None else stored.expected(cache)
    found = None if stored.scheme is None else dict(stored.scheme)
    layout: list[QtrainError] = []
    if found != scheme:
        layout.append(
            ExportError(
                f"quantization_config.kv_cache_scheme={found} there, {scheme} in the run",
                where="config.json",
                rule="it says what keys and values are quantized to",
            )
        )
    for name in scales.keys() & stored.scales.keys():
        counted.add(name, stored.scales[name]().double(), scales[name].double().cpu())
    return layout, list(_names(stored.scales.keys() - scales.keys(), scales.keys() - stored.scales.keys()))


def _names(surplus: set[str], missing: set[str]) -> Iterator[QtrainError]:
    for name in sorted(surplus):
        yield ExportError("no tensor of the model is called so", where=name, rule="an export has the model's tensors")
    for name in sorted(missing):
        yield ExportError("it is missing", where=name, rule="an export has the range of each layer's keys and values")
