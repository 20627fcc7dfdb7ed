"""The keys of `export.format=bitsandbytes`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import ClassVar, Literal

from pydantic import Field

from qtrain.errors import ExportError
from qtrain.export.compressed_tensors.trained import described
from qtrain.export.config import ExportSection, TrainedLayer
from qtrain.export.integers.place import keeping

KINDS = ("nf4", "fp4", "int8")
KEPT = "checkpoint"
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

    def check_base(self, base: str) -> None:
        """By the codes of method.base; what a checkpoint holds is seen when it is exported."""
        if base != KEPT:
            self.check_kinds([] if base == "none" else [base])

    def check_kinds(self, kinds: Collection[str]) -> None:
        """Raise where a base has no place, or would be quantized again unasked.

        Args:
            kinds: of the codes that its layers lie in; none, where they are unquantized.
        """
        there = " and ".join(kinds) or "unquantized weights"
        if self.quantize != "none":
            if kinds and not self.allow_requantize:
                raise ExportError(
                    f"export.quantize={self.quantize} quantizes again what is trained over {there}",
                    rule="an adapter learns beside the codes of its base; the sum of both on such codes is another "
                    "model",
                    fix="export.quantize=none keeps both as they are trained; or export.allow_requantize=true",
                )
        elif not kinds or not {*kinds} <= {*KINDS}:
            again = " export.allow_requantize=true" if kinds else ""
            raise ExportError(
                f"export.format=bitsandbytes keeps a base in the codes that it is trained over: {there}",
                rule="method.base is nf4, fp4 or int8",
                fix=f"export.format=adapter, the adapter alone; or export.quantize=nf4{again} merges and quantizes",
            )
