"""The keys of `export.format=awq`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from qtrain.export.config import TrainedLayer
from qtrain.export.integers.config import IntegerOptions
from qtrain.export.integers.place import Place

PLACE = Place(
    "AWQ holds int4 weights by row or by groups of 32, 64 or 128, symmetric or not; inputs stay in 16 bits",
    bits=(4,),
    group_sizes=(32, 64, 128),
    one_for_all=True,
)


class AwqOptions(IntegerOptions):
    """Words along the output, as AutoAWQ's GEMM kernel has them, with zero points; read by transformers and vLLM.

    What was trained on codes is written with those, whatever the keys say; symmetric ones with zero points of 8.
    """

    implementation: ClassVar[str] = "qtrain.export.awq.write:write"

    bits: Literal[4] = Field(4, description="of a weight")
    symmetric: bool = Field(False, description="zero is in the middle of the codes; false keeps a zero point a group")

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By what AWQ's words and its kernels hold."""
        PLACE.check(layers)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.group_size not in (-1, *PLACE.group_sizes):
            raise ValueError(f"group_size is -1 or one of {', '.join(map(str, PLACE.group_sizes))}, for AWQ's kernels")
        return self
