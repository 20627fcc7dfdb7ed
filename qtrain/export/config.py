"""`export.*`: the format, and the keys that every format shares; formats add their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from qtrain.errors import ConfigError
from qtrain.export.sizes import parse_size
from qtrain.modules.kv.config import KVCacheSection
from qtrain.numerics.spec import QuantSpec
from qtrain.registry import Registry
from qtrain.section import Section

TrainedLayer = tuple[str, QuantSpec | None, QuantSpec | None]
"""Name or pattern of linear layers, and what their weights and inputs are quantized to."""


class ExportSection(Section):
    """Keys that every export format shares; a format derives from this and adds its own."""

    implementation: ClassVar[str]
    """``package.module:attribute`` of the function that writes the format, imported when it runs."""

    takes: ClassVar[Literal["deployed", "trained"]] = "deployed"
    """What that function is given: the model as a plain checkpoint (and the result is measured), or as it trained."""

    streams: ClassVar[bool] = False
    """It asks for one tensor after the other and nothing else, so the model need not be in memory."""

    format: str = Field("compressed-tensors", description="layout of the exported directory")
    dir: str | None = Field(None, description="where to; default: RUN/export/FORMAT")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of tensors that stay unquantized: auto is as model.dtype was in training"
    )
    evaluate: bool = Field(True, description="measure KL, top-1 agreement and perplexity against the trained model")
    evaluate_windows: int = Field(16, ge=1, description="held-out text for that: so many times data.max_length tokens")
    verify: bool = Field(True, description="read it back and compare it with the trained model, number by number")
    max_shard_size: str = Field(
        "1GB", description="largest file of weights, 5GB at most; also bounds the memory of the export"
    )

    @field_validator("max_shard_size")
    @classmethod
    def _a_file_size(cls, text: str) -> str:
        try:
            parse_size(text)
        except ConfigError as error:
            raise ValueError(str(error.rule)) from None
        return text

    def check_trained(self, layers: Iterable[TrainedLayer]) -> None:
        """Raise where layers that are trained on codes have no place in this format; before they are trained.

        Raises:
            ExportError: with the nearest specs that have one.
        """

    def check_base(self, base: str) -> None:
        """Raise where what adapters are trained over, as method.base names it, has no place; before they are trained.

        Raises:
            ExportError: with a format or a base that has one.
        """

    def check_cache(self, cache: KVCacheSection | None) -> None:
        """Raise where a range of keys and values that is kept has no place in a format that has one for others.

        Raises:
            ExportError: with the nearest options that have one.
        """


FORMATS: Registry[type[ExportSection]] = Registry(
    "export format",
    {
        "compressed-tensors": "qtrain.export.compressed_tensors.config:CompressedTensorsOptions",
        "gptq": "qtrain.export.gptq.config:GptqOptions",
        "awq": "qtrain.export.awq.config:AwqOptions",
        "torchao": "qtrain.export.torchao.config:TorchaoOptions",
        "gguf": "qtrain.export.gguf.config:GgufOptions",
        "bitsandbytes": "qtrain.export.bitsandbytes.config:BitsAndBytesOptions",
        "adapter": "qtrain.export.adapter.config:AdapterOptions",
        "merged": "qtrain.export.merged.config:MergedOptions",
    },
)
