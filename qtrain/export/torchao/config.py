"""The keys of `export.format=torchao`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from qtrain.export.config import ExportSection, TrainedLayer
from qtrain.export.torchao.trained import check_layers


class TorchaoOptions(ExportSection):
    """Integer tensors of torchao in safetensors, read by transformers where torchao is installed (0.15 or later).

    A code is a byte there, whatever its bits; ExecuTorch packs them for its kernels when it lowers a model.
    """

    implementation: ClassVar[str] = "qtrain.export.torchao.write:write"
    streams: ClassVar[bool] = True

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By ``qtrain.export.torchao.trained``."""
        check_layers(layers)
