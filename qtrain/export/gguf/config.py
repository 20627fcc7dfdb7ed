"""The keys of `export.format=gguf`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from qtrain.export.config import ExportSection, TrainedLayer
from qtrain.export.gguf.trained import check_layers


class GgufOptions(ExportSection):
    """One .gguf file with weights, metadata and vocabulary, read by llama.cpp, OpenVINO GenAI and transformers.

    What was trained on codes is written on those, whatever the keys say. The file is a whole one: of the three only
    llama.cpp reads split files, so ``max_shard_size`` does not cut it.
    """

    implementation: ClassVar[str] = "qtrain.export.gguf.write:write"
    streams: ClassVar[bool] = True

    quantize: Literal["none", "q4_0", "q8_0"] = Field(
        "none", description="blocks for a model that was not trained on codes; none: merged, in export.dtype"
    )
    ternary: Literal["tq2_0", "tq1_0"] = Field(
        "tq2_0", description="blocks for weights of -1, 0, 1: 2.06 bits a weight, or 1.69 and slower to unpack"
    )
    allow_requantize: bool = Field(
        False,
        description="layers whose trained grid no block type holds are rounded to the nearest type, and the result "
        "says so; trained inputs are left to llama.cpp's own",
    )
    pre_tokenizer: str | None = Field(
        None, description="llama.cpp's name of how text is split before BPE, where it is not recognized: llama-bpe, ..."
    )

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """By ``qtrain.export.gguf.trained``."""
        if not self.allow_requantize:
            check_layers(layers)
