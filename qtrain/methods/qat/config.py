"""The keys of `method.name=qat`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from qtrain.methods.config import MethodSection
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.kv.config import KVCacheSection
from qtrain.numerics.spec import BITS, INTEGER_BITS
from qtrain.registry import did_you_mean
from qtrain.section import Section


class AdapterSection(Section):
    """`method.lora.*`: adapters inside the quantizer, fq(W + BA), so that the exported codes are the trained ones."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="the adapters' product is scaled by lora_alpha / r")


class QatOptions(MethodSection):
    """Quantization-aware training: what is multiplied in training is what will be deployed."""

    implementation: ClassVar[str] = "qtrain.methods.qat.method:Qat"

    weight: WeightSection | None = Field(
        default_factory=WeightSection, description="of every linear layer; null leaves weights as they are"
    )
    activation: QuantizerSection | None = Field(None, description="of every linear layer's input")
    kv_cache: KVCacheSection | None = Field(None, description="of keys and values")
    embedding: WeightSection | None = Field(None, description="of the token embedding's rows")
    head: bool = Field(False, description="quantize lm_head as the other linear layers")
    rules: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description='other keys for layers by name: {"*.down_proj": {weight: {format: int8}, activation: null}}',
    )
    skip: list[str] = Field(default_factory=list, description='layers that stay as they are, by name: ["*.k_proj"]')
    first_last: str | None = Field(None, description="a format for the first and the last layer, such as int8")
    lora: AdapterSection | None = Field(None, description="train adapters inside the quantizer and freeze the weights")
    calibration_rows: int = Field(
        32, ge=0, description="rows of training text from which static ranges and weighted starts are found"
    )
    scale_lr: float | None = Field(None, gt=0, description="learning rate of learned ranges; default: optimizer.lr")
    start_step: int = Field(0, ge=0, description="optimizer steps in full precision before quantization sets in")
    freeze_ranges_step: int | None = Field(None, ge=0, description="learned ranges stay as they are from this step on")
    bits_schedule: dict[int, str] = Field(
        default_factory=dict, description="weight formats from a step on: {0: int8, 500: int6, 1000: int4}"
    )

    @field_validator("first_last")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None and name not in BITS:
            raise ValueError(f"no such format; {did_you_mean(name, BITS)}")
        return name

    @field_validator("bits_schedule")
    @classmethod
    def _known_formats(cls, schedule: dict[int, str]) -> dict[int, str]:
        for step, name in schedule.items():
            if step < 0:
                raise ValueError(f"step {step}: steps count from 0")
            if name not in INTEGER_BITS:
                raise ValueError(f"{name!r}: bits are reduced among int8 .. int2; {did_you_mean(name, INTEGER_BITS)}")
        return schedule

    @model_validator(mode="after")
    def _something(self) -> QatOptions:
        if not any((self.weight, self.activation, self.kv_cache, self.embedding, self.rules)):
            raise ValueError("nothing is quantized: set method.weight.format, method.activation.format or others")
        if self.lora is not None and self.weight is None:
            raise ValueError("method.lora trains inside the weights' quantizer: set method.weight.format")
        if self.bits_schedule:
            last = self.bits_schedule[max(self.bits_schedule)]
            if self.weight is None or INTEGER_BITS.get(self.weight.format, 0) < INTEGER_BITS[last]:
                raise ValueError(
                    f"bits_schedule ends with {last}, which is not what will be deployed: "
                    + (f"a later entry for {self.weight.format}" if self.weight else "set method.weight.format")
                )
        return self
