"""The keys of `method.name=qat`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from qtrain.errors import ConfigError
from qtrain.methods.config import MethodSection
from qtrain.methods.qat.start_config import CONFLICTS, INITS, check_name, check_sections
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.kernel_keys import AUTO, AUTO_ON_GPU, FP8, InputGradient
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.layer_options import section_of
from qtrain.numerics.spec import BITS, INTEGER_BITS, QuantSpec
from qtrain.ptq.keys import StartKeys
from qtrain.registry import did_you_mean
from qtrain.section import Section

LAYER_KEYS = ("weight", "activation", "embedding")
"""What a rule can say about a layer."""


class AdapterSection(Section):
    """`method.lora.*`: adapters inside the quantizer, fq(W + BA), so that the exported codes are the trained ones."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="the adapters' product is scaled by lora_alpha / r")


class QatOptions(StartKeys, MethodSection):
    """Quantization-aware training: what is multiplied in training is what will be deployed."""

    implementation: ClassVar[str] = "qtrain.methods.qat.method:Qat"

    name: str = Field("qat", description="what is quantized and what trains")
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
    init: str | None = Field(
        None,
        description="codes that training begins with, chosen by: "
        + ", ".join(INITS)
        + "; null: by each weight's range",
    )
    calibration_rows: int = Field(
        32, ge=0, description="rows of training text from which static ranges, weighted starts and init are found"
    )
    kernels: Literal["auto", "plain", "triton", "int8", "fp8"] = Field(
        "auto",
        description="arithmetic of the training, with the same codes: plain PyTorch; triton: one-pass kernels on a "
        "GPU; int8: products of the codes themselves where inputs are dynamic by token and weights have one scale a "
        f"row, both symmetric, else as triton; fp8: likewise of fp8_e4m3; auto: {AUTO_ON_GPU} on a GPU, {FP8} "
        f"for layers of fp8 on one with units for it, else {AUTO}",
    )
    input_gradient: InputGradient = Field(
        "full",
        description="gradients of a layer's input: full, or int8: products of bytes, for which the output's gradient "
        "is rounded to int8 by token (with kernels: int8, or auto on a GPU; weights' gradients stay as they are)",
    )
    weight_storage: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="dtype that trained matrices are kept in; bf16: updates are rounded by chance, and gradients are "
        "in bf16 too; norms, biases and ranges stay in fp32",
    )
    scale_lr: float | None = Field(None, gt=0, description="learning rate of learned ranges; default: optimizer.lr")
    start_step: int = Field(0, ge=0, description="optimizer steps in full precision before quantization sets in")
    freeze_ranges_step: int | None = Field(None, ge=0, description="learned ranges stay as they are from this step on")
    bits_schedule: dict[int, str] = Field(
        default_factory=dict, description="weight formats from a step on: {0: int8, 500: int6, 1000: int4}"
    )

    @field_validator("rules")
    @classmethod
    def _known_options(cls, rules: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        for pattern, changes in rules.items():
            for key in changes:
                if key not in LAYER_KEYS:
                    raise ValueError(f"{key!r} of {pattern!r} is no option of a layer; {did_you_mean(key, LAYER_KEYS)}")
                try:
                    section_of(changes[key], key, f"{pattern}: {key}", info.data.get(key))
                except ConfigError as error:
                    raise ValueError(f"{error.where}: {error.what}") from None
        return rules

    @field_validator("init")
    @classmethod
    def _known_start(cls, init: str | None) -> str | None:
        if init is not None:
            check_name(init)
        return init

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

    def trained_layers(self) -> Iterator[tuple[str, QuantSpec | None, QuantSpec | None]]:
        """In general, at the ends, and by each rule; whether a layer fits a rule is seen when there is a model."""
        general = {"weight": self.weight, "activation": self.activation}
        yield "method.weight", *_specs(general)
        if self.first_last is not None:
            changes = {key: {"format": self.first_last} for key, section in general.items() if section}
            yield "method.first_last", *_specs(general, changes)
        for pattern, changes in self.rules.items():
            if changes.keys() & general.keys():
                yield f"method.rules[{pattern!r}]", *_specs(general, changes)

    @property
    def trained_cache(self) -> KVCacheSection | None:
        """``kv_cache``."""
        return self.kv_cache

    @model_validator(mode="after")
    def _something(self) -> QatOptions:
        if not any((self.weight, self.activation, self.kv_cache, self.embedding, self.rules)):
            raise ValueError("nothing is quantized: set method.weight.format, method.activation.format or others")
        if self.lora is not None and self.weight is None:
            raise ValueError("method.lora trains inside the weights' quantizer: set method.weight.format")
        if self.kv_cache is not None and self.kv_cache.smooth:
            if self.lora is not None:
                raise ValueError(
                    "kv_cache.smooth with lora: adapters are trained over the weights of model.path as they are"
                )
            if not self.calibration_rows:
                raise ValueError("kv_cache.smooth looks at text: calibration_rows=32")
        if self.weight_storage == "bf16" and self.lora is not None:
            raise ValueError("weight_storage: bf16 is for weights that train, and under lora they are frozen as stored")
        if self.input_gradient == "int8" and self.kernels not in ("auto", "int8"):  # auto: seen on the device
            raise ValueError("input_gradient: int8 is for layers whose products are of bytes: kernels: int8")
        if self.bits_schedule:
            last = self.bits_schedule[max(self.bits_schedule)]
            if self.weight is None or INTEGER_BITS.get(self.weight.format, 0) < INTEGER_BITS[last]:
                raise ValueError(
                    f"bits_schedule ends with {last}, which is not what will be deployed: "
                    + (f"a later entry for {self.weight.format}" if self.weight else "set method.weight.format")
                )
        return self

    @model_validator(mode="after")
    def _start_stays(self) -> QatOptions:
        if self.init is None:
            return self
        own = [section_of(it["weight"], "weight", None, self.weight) for it in self.rules.values() if "weight" in it]
        inputs = self.activation is not None or any(it.get("activation") is not None for it in self.rules.values())
        weights = [section for section in (self.weight, *own) if section is not None]
        check_sections(self.init, weights, inputs=inputs)
        for key, reason in CONFLICTS.items():
            if getattr(self, key):
                raise ValueError(f"init={self.init} with {key}: {reason}: init=null, or leave {key} out")
        if self.start_options(self.init).needs_text and not self.calibration_rows:
            raise ValueError(f"init={self.init} looks at text: calibration_rows=128, or init=hqq, which needs none")
        return self


def _specs(
    general: Mapping[str, QuantizerSection | None], changes: Mapping[str, Any] | None = None
) -> tuple[QuantSpec | None, QuantSpec | None]:
    """Of weights and of inputs, with what a rule changes."""
    found = {
        key: section_of(changes[key], key, None, section) if changes and key in changes else section
        for key, section in general.items()
    }
    weight, activation = found["weight"], found["activation"]
    return (
        None if weight is None else weight.spec(weight=True),
        None if activation is None else activation.spec(weight=False),
    )
