"""The keys of `export.format=compressed-tensors`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from qtrain.export.compressed_tensors.kv_cache import check_cache
from qtrain.export.compressed_tensors.trained import check_layers
from qtrain.export.config import TrainedLayer
from qtrain.export.integers.config import IntegerOptions
from qtrain.modules.kv.config import KVCacheSection


class CompressedTensorsOptions(IntegerOptions):
    """Integer weights in 32-bit words (pack-quantized), read by transformers and vLLM.

    What was trained on codes is written with those, whatever the keys say; beside int8 inputs weights are bytes
    (int-quantized).
    """

    implementation: ClassVar[str] = "qtrain.export.compressed_tensors.write:write"

    bits: Literal[4, 8] = Field(4, description="of a weight")

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By ``qtrain.export.compressed_tensors.trained``."""
        check_layers(layers)

    def check_cache(self, cache: KVCacheSection | None) -> None:
        """By ``qtrain.export.compressed_tensors.kv_cache``."""
        check_cache(cache)
