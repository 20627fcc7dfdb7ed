"""What a number becomes: the description that training, export and kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from qtrain.errors import ConfigError
from qtrain.registry import did_you_mean

ScaleDtype = Literal["fp16", "bf16"]
INTEGER_BITS = {f"int{bits}": bits for bits in range(2, 9)}


@dataclass(frozen=True)
class QuantSpec:
    """How a weight [out, in] is quantized.

    per_channel: one scale a row, [out, 1]. per_group: one scale for group_size neighbours along ``in``,
    [out, in / group_size]. A torch-free value object: hashable, and a plain dict both ways.

    Attributes:
        format: of the codes: int2 .. int8.
        symmetric: zero is code 0 and no zero point is kept.
        granularity: which weights share a scale.
        group_size: for per_group only.
        full_range: use -2^(b-1) too; for formats whose kernels hold it (two's complement has one more
            negative code than positive ones).
        scale_dtype: what scales are stored in. bf16 keeps them on values that fp16 holds as well, so that a consumer
            running in fp32, bf16 or fp16 reads the same number.
    """

    format: str = "int4"
    symmetric: bool = True
    granularity: Literal["per_channel", "per_group"] = "per_group"
    group_size: int | None = 32
    full_range: bool = False
    scale_dtype: ScaleDtype = "fp16"

    def __post_init__(self) -> None:
        if self.format not in INTEGER_BITS:
            raise ConfigError(f"format={self.format!r} is unknown", fix=did_you_mean(str(self.format), INTEGER_BITS))
        if not self.symmetric:
            raise ConfigError("symmetric=False", rule="integer weights are symmetric", fix="symmetric=True")
        if self.granularity not in ("per_channel", "per_group"):
            raise ConfigError(
                f"granularity={self.granularity!r} is unknown",
                fix=did_you_mean(str(self.granularity), ["per_channel", "per_group"]),
            )
        if self.granularity == "per_group" and (self.group_size is None or self.group_size < 1):
            raise ConfigError(
                f"group_size={self.group_size}", rule="per_group needs a group_size of at least 1", fix="group_size=32"
            )
        if self.granularity == "per_channel" and self.group_size is not None:
            raise ConfigError(
                f"group_size={self.group_size} with granularity='per_channel'",
                rule="a channel is one group",
                fix="group_size=None, or granularity='per_group'",
            )
        if self.scale_dtype not in ("fp16", "bf16"):
            raise ConfigError(f"scale_dtype={self.scale_dtype!r}", rule="scales are stored in fp16 or bf16")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return INTEGER_BITS[self.format]

    @property
    def quant_min(self) -> int:
        """The lowest code: -(2^(b-1) - 1), or one less with full_range."""
        return -self.quant_max - int(self.full_range)

    @property
    def quant_max(self) -> int:
        """The highest code: 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QuantSpec:
        """The spec that ``to_dict`` described; a key it does not know is an error."""
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                raise ConfigError(f"{key!r} is no key of a QuantSpec", fix=did_you_mean(key, known))
        return cls(**content)
