"""The keys that formats of integer weights share."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from qtrain.export.config import ExportSection


class IntegerOptions(ExportSection):
    """How codes are chosen where none were trained; what was trained on codes is written with those."""

    streams: ClassVar[bool] = True

    bits: int = Field(4, description="of a weight")
    symmetric: bool = Field(True, description="zero is in the middle of the codes; false keeps a zero point a group")
    group_size: int = Field(32, description="weights that share a scale; -1: one scale a row")
    scales: Literal["mse", "absmax"] = Field("mse", description="least squared error, or each group's extremes")
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq", description="to the nearest code; or with GPTQ's error feedback over correlated inputs, slower"
    )
    calibration_rows: int = Field(
        32, ge=0, description="rows of training text whose layer inputs weigh the errors; 0: none, all inputs alike"
    )
    ignore: list[str] = Field(
        default_factory=list, description="layers that stay in 16 bits: names, or re:PATTERN; lm_head always does"
    )

    @field_validator("group_size")
    @classmethod
    def _a_size(cls, group_size: int) -> int:
        if group_size != -1 and group_size < 1:
            raise ValueError("it is -1 (one scale a row) or a number of weights, such as 32, 64 or 128")
        return group_size

    @model_validator(mode="after")
    def _gptq_needs_text(self) -> Self:
        if self.rounding == "gptq" and not self.calibration_rows:
            raise ValueError("rounding=gptq needs calibration_rows; without them use export.rounding=nearest")
        return self
