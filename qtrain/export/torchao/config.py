"""The keys of `export.format=torchao`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar

from qtrain.errors import ExportError
from qtrain.export.config import ExportSection, TrainedLayer
from qtrain.export.torchao.trained import check_layers


class TorchaoOptions(ExportSection):
    """Integer and fp8 tensors of torchao in safetensors, read by transformers with torchao (0.15 or later).

    A code is a byte there, whatever its bits; ExecuTorch packs integers for its kernels when it lowers a model.
    """

    implementation: ClassVar[str] = "qtrain.export.torchao.write:write"
    streams: ClassVar[bool] = True

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By ``qtrain.export.torchao.trained``; fp8 that is to be run here needs torchao, too."""
        layers = list(layers)
        check_layers(layers)
        floats = [where for where, weight, _ in layers if weight is not None and weight.is_float]
        if floats and self.evaluate and find_spec("torchao") is None:
            raise ExportError(
                "torchao is not installed",
                where=floats[0],
                rule="export.evaluate=true runs the export, and torchao alone runs its fp8 weights",
                fix="pip install torchao, or export.evaluate=false",
            )
