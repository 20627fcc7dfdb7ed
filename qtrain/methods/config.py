"""`method.*`: the table of methods; each owns its keys in its own package."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from qtrain.models.config import refuse_fp16
from qtrain.registry import Registry
from qtrain.section import Section


class MethodSection(Section):
    """Keys that every method shares; a method derives from this and adds its own."""

    implementation: ClassVar[str]
    """``package.module:attribute`` of the Method subclass, imported when it runs."""

    name: str = Field("qlora", description="what is quantized and what trains")
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="what products run in: auto is bf16 where the device has it, else fp32"
    )

    _fp16 = field_validator("compute_dtype", mode="before")(refuse_fp16)


METHODS: Registry[type[MethodSection]] = Registry(
    "method",
    {
        "qlora": "qtrain.methods.qlora.config:QLoraOptions",
        "qat": "qtrain.methods.qat.config:QatOptions",
    },
)
