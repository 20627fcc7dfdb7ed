"""The keys of `export.format=adapter`."""

from __future__ import annotations

from typing import ClassVar, Literal

from qtrain.export.config import ExportSection


class AdapterOptions(ExportSection):
    """The trained adapter alone, in PEFT's layout: PeftModel.from_pretrained puts it on its base."""

    implementation: ClassVar[str] = "qtrain.export.adapter.write:write_adapter"
    takes: ClassVar[Literal["deployed", "trained"]] = "trained"
