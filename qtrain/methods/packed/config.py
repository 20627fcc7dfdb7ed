"""Keys that methods over packed integers share: what is packed, and what chooses the integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from qtrain.errors import ConfigError
from qtrain.methods.config import KEPT, MethodSection
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.layer_options import section_of
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import STARTS, BlockApSection, SpqrSection, StartSection
from qtrain.ptq.keys import StartKeys
from qtrain.registry import did_you_mean

INITS = (*STARTS, KEPT)
"""Starting points by name; checkpoint: the codes that model.path holds already."""
UNUSED = ("range", "calibrate", "bounds", "pact_alpha", "convention")
"""Keys of a quantizer that packed weights have no use for: what chooses their ranges is method.init."""


class PackedKeys(StartKeys):
    """Which linear layers lie in packed integers, and what chooses those."""

    place: ClassVar[str] = "method"
    """Section that these keys stand in, for errors."""

    weight: WeightSection = Field(
        default_factory=WeightSection,
        description="of every linear layer: format int2 .. int8, symmetric, group_size; without one a scale a row",
    )
    rules: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description='other keys for layers by name: {"*.down_proj": {weight: {format: int8}}}'
    )
    skip: list[str] = Field(default_factory=list, description='layers that stay as they are, by name: ["*.k_proj"]')
    head: bool = Field(False, description="pack lm_head as the other linear layers")
    init: str = Field("gptq", description="what chooses the integers: " + ", ".join(INITS))
    calibration_rows: int = Field(
        128, ge=1, description="rows of training text that starting points look at, where they look at text"
    )
    kernels: Literal["auto", "plain", "triton"] = Field(
        "auto",
        description="of packed layers: plain is PyTorch's operations, triton unpacks in one pass and sums the scales' "
        "gradients in one; auto is triton where there is a GPU",
    )
    spqr: SpqrSection = Field(default_factory=SpqrSection, description="options of init=spqr")
    block_ap: BlockApSection = Field(default_factory=BlockApSection, description="options of init=block_ap")

    @property
    def start(self) -> StartSection:
        """The chosen starting point with its options."""
        return self.start_options(self.init)

    @property
    def general_activation(self) -> QuantizerSection | None:
        """Of layer inputs; None leaves them as they are."""
        return None

    @property
    def looks_at_text(self) -> bool:
        """Where the starting point does, or inputs have ranges of their own to calibrate."""
        activation = self.general_activation
        kept = activation is not None and activation.range != "dynamic" and activation.bounds is None
        return kept or (self.init != KEPT and self.start.needs_text)

    @field_validator("weight")
    @classmethod
    def _only_codes(cls, weight: WeightSection) -> WeightSection:
        for key in UNUSED:
            if getattr(weight, key) != WeightSection.model_fields[key].default:
                where = f"{cls.place}.init"
                raise ValueError(f"{key}: ranges of packed weights come from {where}, not from a quantizer's {key}")
        if weight.format == "binary" or weight.format.startswith("fp8"):
            raise ValueError(f"format: {weight.format} is not packed: int2 .. int8 or ternary are, such as int4")
        if weight.granularity not in (None, "per_channel", "per_group"):
            raise ValueError(f"granularity: {weight.granularity}: packed weights share scales per_channel or per_group")
        return weight

    @field_validator("rules")
    @classmethod
    def _known_options(cls, rules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for pattern, changes in rules.items():
            for key in changes:
                if key not in ("weight", "activation"):
                    known = ("weight", "activation")
                    raise ValueError(f"{key!r} of {pattern!r} is no option of a layer; {did_you_mean(key, known)}")
                try:
                    section_of(changes[key], key, f"{pattern}: {key}")
                except ConfigError as error:
                    raise ValueError(f"{error.where}: {error.what}") from None
        return rules

    @field_validator("init")
    @classmethod
    def _known_start(cls, init: str) -> str:
        if init not in INITS:
            raise ValueError(f"no such starting point; {did_you_mean(init, INITS)}")
        return init

    @model_validator(mode="after")
    def _smooth_inputs(self) -> Self:
        if self.init == "smoothquant" and self.general_activation is None:
            raise ValueError(
                "init=smoothquant moves the outliers of quantized inputs into the weights, and inputs are not "
                "quantized here: init=awq or gptq, or method.activation.format=int8 with method.name=ptq"
            )
        return self


class PackedOptions(PackedKeys, MethodSection):
    """A method over packed integers, with their keys among its own."""

    codes_key: ClassVar[str | None] = "init"

    def trained_layers(self) -> Iterator[tuple[str, QuantSpec | None, QuantSpec | None]]:
        """In general and by each rule; of a checkpoint that holds its codes already nothing is known here."""
        if self.init == KEPT:
            return
        general: dict[str, QuantizerSection | None] = {"weight": self.weight, "activation": self.general_activation}
        yield "method.weight", *_specs(general)
        for pattern, changes in self.rules.items():
            own = {key: section_of(changes.get(key, kept), key, None, kept) for key, kept in general.items()}
            yield f"method.rules[{pattern!r}]", *_specs(own)


def _specs(sections: Mapping[str, QuantizerSection | None]) -> tuple[QuantSpec | None, QuantSpec | None]:
    weight, activation = sections["weight"], sections["activation"]
    return (
        None if weight is None else weight.spec(weight=True),
        None if activation is None else activation.spec(weight=False),
    )
