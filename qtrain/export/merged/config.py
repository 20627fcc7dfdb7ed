"""The keys of `export.format=merged`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qtrain.export.config import ExportSection


class MergedOptions(ExportSection):
    """Unquantized weights with the trained change merged in, as a plain checkpoint."""

    implementation: ClassVar[str] = "qtrain.export.merged.write:write"
    streams: ClassVar[bool] = True

    base: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="merge into the base that was trained on, dequantized; or into the original 16-bit weights, which "
        "the adapter never saw",
    )
