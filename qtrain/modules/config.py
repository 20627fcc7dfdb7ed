"""The keys of a quantizer, spelled one way everywhere: `method.weight`, `method.activation`, `method.kv_cache`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qtrain.errors import ConfigError
from qtrain.numerics.bounds import bounds_of
from qtrain.numerics.observers.registry import OBSERVERS
from qtrain.numerics.spec import BITS, Convention, Granularity, QuantSpec, ScaleDtype
from qtrain.registry import did_you_mean
from qtrain.section import Section

Range = Literal["dynamic", "static", "learned", "pact"]
STARTS = ("lsq", "mse", "min_max")
"""Values of ``calibrate`` that need no observer to start a weight's range; every observer is a value too."""


class QuantizerSection(Section):
    """What a number becomes, and where the range of its codes comes from."""

    format: str = Field("int8", description="int2 .. int8, ternary, binary, fp8_e4m3 or fp8_e5m2")
    symmetric: bool = Field(True, description="zero is code 0; false keeps a zero point")
    granularity: Granularity | None = Field(
        None,
        description="which numbers share a scale: per_tensor, per_channel, per_group, per_token, per_block; "
        "default: per_group with a group_size, else per_channel for weights, per_token for activations "
        "(per_tensor if not dynamic)",
    )
    group_size: int | None = Field(None, ge=1, description="for per_group and per_block")
    range: Range = Field(
        "dynamic",
        description="dynamic: the tensor's own extremes; static: calibrated and kept; learned: trained (LSQ; LSQ+ if "
        "asymmetric; SEQ for mid_rise and ternary; elastic binary); pact: a trained clipping bound",
    )
    calibrate: str = Field(
        "min_max",
        description=f"how static ranges and learned starts are found: {', '.join(OBSERVERS.names())}, "
        "or lsq (2 mean|x| / sqrt(quant_max))",
    )
    bounds: tuple[float, float] | str | None = Field(
        None,
        description="a range known in advance: [low, high], or a function's: sigmoid_input (+-6), tanh_input (+-3), "
        "sigmoid_output, tanh_output, softmax_output",
    )
    full_range: bool = Field(False, description="use the code -2^(b-1) too")
    mid_rise: bool = Field(False, description="levels at half-integers, none at zero: SEQ at 2 bits")
    convention: Convention = Field(
        "vllm",
        description="dynamic symmetric scales: vllm (absmax/127), compressed-tensors (absmax/127.5), torchao (that, "
        "with its rounding of what lies between two codes: for method.kernels=int8)",
    )
    scale_dtype: ScaleDtype | None = Field(
        None, description="what scales are rounded to as they are used; default: bf16 for weights, else fp32"
    )
    pact_alpha: float = Field(10.0, gt=0, description="PACT's bound at the start")

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BITS:
            raise ValueError(f"no such format; {did_you_mean(name, BITS)}")
        return name

    @field_validator("calibrate")
    @classmethod
    def _a_start(cls, name: str) -> str:
        known = [*OBSERVERS.names(), "lsq"]
        if name not in known:
            raise ValueError(f"no such way to find a range; {did_you_mean(name, known)}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> QuantizerSection:
        try:
            self.spec(weight=True)
        except ConfigError as error:
            raise ValueError(f"{error.what}: {error.rule or 'not allowed'}" + _way_out(error)) from None
        if self.bounds is not None:
            if self.range != "static":
                raise ValueError("bounds belong to range: static")
            self.known_bounds()
        if self.range == "pact" and (self.format in ("ternary", "binary") or self.format.startswith("fp8")):
            raise ValueError(f"range: pact clips integer formats, not {self.format}: format: int4")
        if self.calibrate != "min_max" and self.range == "dynamic":
            raise ValueError(
                f"calibrate: {self.calibrate} with range: dynamic, the tensor's own extremes: range: learned or "
                "static, or calibrate: min_max"
            )
        if self.calibrate == "kl" and not self.symmetric:
            raise ValueError("calibrate: kl chooses one threshold for |x|: symmetric: true, or calibrate: mse")
        if self.calibrate not in STARTS and self.format in ("binary", "ternary"):
            raise ValueError(f"{self.format} has no histogram's threshold: calibrate: mse")
        if self.calibrate == "lsq" and not self.symmetric:
            raise ValueError("calibrate: lsq is a symmetric start: calibrate: mse")
        if self.range == "learned" and self.format.startswith("fp8"):
            raise ValueError("fp8 ranges are dynamic or static: the format's own exponent follows the numbers")
        return self

    def spec(self, *, weight: bool) -> QuantSpec:
        """The spec for a weight, or for an activation."""
        granularity = self.granularity
        if granularity is None and self.group_size is not None:
            granularity = "per_group"
        elif granularity is None:
            granularity = "per_channel" if weight else "per_token" if self.range == "dynamic" else "per_tensor"
        return QuantSpec(
            format=self.format,
            symmetric=self.symmetric,
            granularity=granularity,
            group_size=self.group_size,
            full_range=self.full_range,
            mid_rise=self.mid_rise,
            convention=self.convention,
            scale_dtype=self.scale_dtype or ("bf16" if weight else "fp32"),
        )

    def known_bounds(self) -> tuple[float, float]:
        """``bounds`` as (low, high)."""
        assert self.bounds is not None
        if not isinstance(self.bounds, str):
            return self.bounds
        function, _, side = self.bounds.rpartition("_")
        try:
            known = bounds_of(function)._asdict().get(side)
        except ConfigError as error:
            raise ValueError(f"{error.what}{_way_out(error)}") from None
        if known is None:
            raise ValueError(f"bounds={self.bounds!r}: say {function}_input or {function}_output; softmax has no input")
        low, high = known
        return float(low), float(high)

    def merged(self, changes: dict[str, Any]) -> QuantizerSection:
        """These keys with others in their place; a rule for some layers names only what differs."""
        kept = self.model_dump(exclude_unset=True)
        if "granularity" in changes and "group_size" not in changes:
            kept.pop("group_size", None)
        if changes.get("range") == "dynamic" and "calibrate" not in changes:
            kept.pop("calibrate", None)
        return type(self).model_validate(kept | changes)


def _way_out(error: ConfigError) -> str:
    return f"; {error.fix}" if error.fix else ""


class WeightSection(QuantizerSection):
    """`method.weight.*`: int4 unless it is said."""

    format: str = Field("int4", description="int2 .. int8, ternary, binary, fp8_e4m3 or fp8_e5m2")

    @model_validator(mode="after")
    def _no_histogram_for_each_group(self) -> WeightSection:
        if self.calibrate not in STARTS and self.group_size is not None:
            # A histogram has 32 kB a group: 34 GB for a 4096 x 4096 weight in groups of 64.
            raise ValueError(f"calibrate: {self.calibrate} for each group of a weight: calibrate: mse")
        return self
