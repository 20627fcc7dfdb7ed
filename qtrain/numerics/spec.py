"""What a number becomes: the description that training, export and kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from qtrain.errors import ConfigError
from qtrain.registry import did_you_mean

ScaleDtype = Literal["fp16", "bf16", "fp32"]
Granularity = Literal["per_tensor", "per_channel", "per_group", "per_token", "per_block"]
Convention = Literal["vllm", "compressed-tensors", "torchao"]
INTEGER_BITS = {f"int{bits}": bits for bits in range(2, 9)}
FLOAT_MAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
BITS = INTEGER_BITS | {"ternary": 2, "binary": 1} | dict.fromkeys(FLOAT_MAX, 8)


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized. A torch-free value object: hashable, and a plain dict both ways.

    Which numbers share a scale, for a weight [out, in] or an activation [.., tokens, features]:

        per_tensor   all                                     scale [1, 1]
        per_channel  a weight's row                          scale [out, 1]
        per_token    an activation's row, its last dimension  scale [rows, 1]
        per_group    group_size neighbours of a row          scale [rows, in / group_size]
        per_block    group_size neighbours of the flattened   scale [1, size / group_size]

    Attributes:
        format: of the codes: int2 .. int8, ternary (-1, 0, 1), binary (-1, 1), fp8_e4m3, fp8_e5m2.
        symmetric: zero is code 0 and no zero point is kept.
        granularity: see above.
        group_size: for per_group and per_block only.
        full_range: use -2^(b-1) too; for formats whose kernels hold it (two's complement has one more
            negative code than positive ones).
        mid_rise: levels at half-integers, x = (q + 1/2) s: as many below zero as above, none at zero (ParetoQ's SEQ).
        convention: of dynamic symmetric scales: vllm divides the largest number by 2^(b-1) - 1 (127 for int8),
            compressed-tensors by 2^(b-1) - 1/2 (127.5) and clamps the largest code; torchao likewise, but multiplies
            by 1 / s where the others divide by s: the largest number lies between two codes, and may go to the other.
        scale_dtype: what scales are stored in. bf16 keeps them on values that fp16 holds as well, so that a consumer
            running in fp32, bf16 or fp16 reads the same number; fp32 is for scales that are never stored.
    """

    format: str = "int4"
    symmetric: bool = True
    granularity: Granularity = "per_group"
    group_size: int | None = 32
    full_range: bool = False
    mid_rise: bool = False
    convention: Convention = "vllm"
    scale_dtype: ScaleDtype = "fp16"

    def __post_init__(self) -> None:
        _among("format", self.format, list(BITS))
        _among("granularity", self.granularity, get_args(Granularity))
        _among("convention", self.convention, get_args(Convention))
        _among("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        grouped = self.granularity in ("per_group", "per_block")
        if grouped and (self.group_size is None or self.group_size < 1):
            raise ConfigError(
                f"group_size={self.group_size}",
                rule=f"{self.granularity} needs a group_size of at least 1",
                fix="group_size=32",
            )
        if not grouped and self.group_size is not None:
            raise ConfigError(
                f"group_size={self.group_size} with granularity={self.granularity!r}",
                rule="only per_group and per_block have groups",
                fix="group_size=None, or granularity='per_group'",
            )
        integer = self.format in INTEGER_BITS
        for name, value in (
            ("symmetric=False", not self.symmetric),
            ("full_range=True", self.full_range),
            ("mid_rise=True", self.mid_rise),
            (f"convention={self.convention!r}", self.convention != "vllm"),
        ):
            if value and not integer:
                raise ConfigError(f"{name} with format={self.format!r}", rule="only int2 .. int8 have that choice")
        if self.mid_rise and not self.symmetric:
            raise ConfigError("mid_rise=True with symmetric=False", rule="half-integer levels lie around zero")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return BITS[self.format]

    @property
    def is_float(self) -> bool:
        """Codes are 8-bit floats."""
        return self.format in FLOAT_MAX

    @property
    def rows_share_scales(self) -> bool:
        """Rows cannot be taken apart: one scale may stand for numbers of several."""
        return self.granularity in ("per_tensor", "per_block")

    @property
    def quant_min(self) -> int:
        """The lowest code: -(2^(b-1) - 1), or one less where the whole range is used."""
        whole = self.full_range or self.mid_rise or not self.symmetric or self.convention != "vllm"
        return -self.quant_max - int(whole)

    @property
    def quant_max(self) -> int:
        """The highest code: 2^(b-1) - 1; 1 for ternary and binary; the largest number for fp8."""
        if self.format in FLOAT_MAX:
            return int(FLOAT_MAX[self.format])
        return (1 << (self.bits - 1)) - 1 if self.format in INTEGER_BITS else 1

    @property
    def reach(self) -> float:
        """max|x| / scale of a symmetric range: what the largest number is divided by."""
        if self.mid_rise:
            return self.quant_max + 1.0  # ParetoQ: a = max|w| = 2^(b-1) s, the outer edge of the last cell
        return self.quant_max + (0.5 if self.convention != "vllm" else 0.0)

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


def _among(key: str, value: object, known: list[str] | tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value!r} is unknown", fix=did_you_mean(str(value), known))
