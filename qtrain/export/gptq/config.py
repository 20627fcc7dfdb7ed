"""The keys of `export.format=gptq`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from qtrain.export.config import TrainedLayer
from qtrain.export.integers.config import IntegerOptions
from qtrain.export.integers.place import Place

PLACE = Place(
    "GPTQ holds int2, int3, int4 or int8 weights by row or by groups of 16, 32, 64, 128, 256, 512 or 1024, symmetric "
    "or not; inputs stay in 16 bits",
    bits=(2, 3, 4, 8),
    # What GPTQModel's kernels take (7.7); its loader refuses others.
    group_sizes=(16, 32, 64, 128, 256, 512, 1024),
)


class GptqOptions(IntegerOptions):
    """Words along the input, as AutoGPTQ laid them out; read by transformers, GPTQModel, vLLM and SGLang.

    What was trained on codes is written with those, whatever the keys say.
    """

    implementation: ClassVar[str] = "qtrain.export.gptq.write:write"

    bits: Literal[2, 3, 4, 8] = Field(4, description="of a weight")
    layout: Literal["auto", "v1", "v2"] = Field(
        "auto",
        description="v1: zero points less one, which vLLM reads of symmetric codes; v2: as they are; auto: v1 "
        "where all codes are symmetric",
    )

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By what GPTQ's words and its kernels hold."""
        PLACE.check(layers)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.layout == "v1" and not self.symmetric:
            raise ValueError("layout=v1 has no place for a zero point of 0: layout=v2, or symmetric=true")
        if self.group_size not in (-1, *PLACE.group_sizes):
            raise ValueError(f"group_size is -1 or one of {', '.join(map(str, PLACE.group_sizes))}, for GPTQ's kernels")
        return self
