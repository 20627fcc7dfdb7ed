"""`method.*`: the table of methods; each owns its keys in its own package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from qtrain.models.config import refuse_fp16
from qtrain.modules.kv.config import KVCacheSection
from qtrain.numerics.spec import QuantSpec
from qtrain.registry import Registry
from qtrain.section import Section

KEPT = "checkpoint"
"""The value that keeps the codes of a quantized checkpoint."""


class MethodSection(Section):
    """Keys that every method shares; a method derives from this and adds its own."""

    implementation: ClassVar[str]
    """``package.module:attribute`` of the Method subclass, imported when it runs."""
    trains: ClassVar[bool] = True
    """Whether there is anything to fit."""
    codes_key: ClassVar[str | None] = None
    """Key whose value ``checkpoint`` keeps the codes that model.path holds; None where none can be kept."""
    takes_codebooks: ClassVar[bool] = False
    """Whether codes may be places in a table (bitsandbytes, AQLM), of which no scale trains."""
    takes_fp8: ClassVar[bool] = False
    """Whether it has frozen weights that may be multiplied in fp8."""

    name: str = Field("qlora", description="what is quantized and what trains")
    compute_dtype: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        "auto",
        description="what products run in: auto is bf16 where the device has it, else fp32; fp8: as auto, but frozen "
        "weights under adapters, their inputs and gradients rounded to e4m3 rows",
    )

    @property
    def keeps_codes(self) -> bool:
        """Whether weights stay in the codes that model.path holds."""
        return self.codes_key is not None and getattr(self, self.codes_key) == KEPT

    @property
    def looks_at_text(self) -> bool:
        """Whether preparing a model needs data.train."""
        return self.trains

    def trained_layers(self) -> Iterator[tuple[str, QuantSpec | None, QuantSpec | None]]:
        """Where linear layers get codes of their own: key or pattern, specs of weights and of inputs."""
        yield from ()

    @property
    def trained_cache(self) -> KVCacheSection | None:
        """What keys and values are trained as."""
        return None

    _fp16 = field_validator("compute_dtype", mode="before")(refuse_fp16)

    @model_validator(mode="after")
    def _fp8_where_weights_are_frozen(self) -> Self:
        if self.compute_dtype == "fp8" and not self.takes_fp8:
            raise ValueError(
                f"compute_dtype=fp8 is for frozen weights under adapters, and {self.name} has none: use auto, or for "
                "fp8 that is deployed method.name=qat method.weight.format=fp8_e4m3"
            )
        return self


METHODS: Registry[type[MethodSection]] = Registry(
    "method",
    {
        "qlora": "qtrain.methods.qlora.config:QLoraOptions",
        "qat": "qtrain.methods.qat.config:QatOptions",
        "peqa": "qtrain.methods.peqa.config:PeqaOptions",
        "ptq": "qtrain.methods.ptq.config:PtqOptions",
    },
)
