"""The keys of `export.format=bitsandbytes`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import described
from qtrain.export.config import ExportSection, TrainedLayer
from qtrain.export.integers.place import keeping

RULE = "bitsandbytes holds NF4, FP4 and LLM.int8(), of which no method but qlora trains anything"


class BitsAndBytesOptions(ExportSection):
    """The frozen base in the codes that it was trained over, and the adapter beside it: nothing is merged.

    transformers reads the directory as the base, PEFT puts DIRECTORY/adapter on it.
    """

    implementation: ClassVar[str] = "qtrain.export.bitsandbytes.write:write"

    quantize: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none",
        description="none: base and adapter as they were trained; else the adapter is merged, and the sum quantized "
        "anew: another model",
    )
    allow_requantize: bool = Field(
        False, description="export.quantize of a base that lies in codes already; the loss is measured and told"
    )

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """Codes that train have no place here.

        Raises:
            ExportError: with the format that keeps them.
        """
        for where, weight, activation in layers:
            if weight is not None or activation is not None:
                raise ExportError(
                    f"no place for {described(weight)} weights with {described(activation)} inputs",
                    where=where,
                    rule=RULE,
                    fix=keeping(weight, activation),
                )
