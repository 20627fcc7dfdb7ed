"""The keys of `method.name=ptq`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qtrain.methods.packed.config import PackedOptions
from qtrain.modules.config import QuantizerSection


class PtqOptions(PackedOptions):
    """Post-training quantization: a starting point is the result, and nothing trains."""

    implementation: ClassVar[str] = "qtrain.methods.ptq.method:Ptq"
    trains: ClassVar[bool] = False

    name: str = Field("ptq", description="what is quantized and what trains")
    activation: QuantizerSection | None = Field(None, description="of every packed layer's input")

    @property
    def general_activation(self) -> QuantizerSection | None:
        """``activation``."""
        return self.activation
