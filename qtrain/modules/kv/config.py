"""``method.kv_cache.*``: what keys and values become before attention multiplies with them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qtrain.modules.config import QuantizerSection
from qtrain.numerics.spec import BITS
from qtrain.registry import did_you_mean
from qtrain.section import Section

Site = Literal["post_rope", "pre_rope"]
Share = Literal["per_tensor", "per_token", "per_head", "per_channel"]

KIVI_RESIDUAL = 128
"""Tokens that Liu et al. (arXiv 2402.02750) keep in full precision."""


class KVSide(Section):
    """What is different for keys, or for values."""

    format: str | None = Field(None, description="int2 .. int8, fp8_e4m3 or fp8_e5m2")
    symmetric: bool | None = Field(None, description="zero is code 0; false keeps a zero point")
    full_range: bool | None = Field(None, description="use the code -2^(b-1) too")
    mid_rise: bool | None = Field(None, description="levels at half-integers, none at zero")

    @field_validator("format")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in BITS:
            raise ValueError(f"no such format; {did_you_mean(name, BITS)}")
        return name


class KVCacheSection(QuantizerSection):
    """Keys and values as a cache will store them; ``share`` takes the place of ``granularity``."""

    site: Site = Field(
        "post_rope",
        description="where keys are quantized: post_rope, rotated, as serving engines cache them; pre_rope, as they "
        "enter the rotary embedding (LLM-QAT), to be rotated at each read",
    )
    share: Share | None = Field(
        None,
        description="which numbers share a scale: per_head, one token's numbers of one head (default); per_token, over "
        "all heads; per_channel, group_size tokens of a key's channel, values per token and head (KIVI); per_tensor, "
        "all there are (default of static and learned ranges)",
    )
    group_size: int | None = Field(
        None, ge=1, description="per_head: channels of a head that share a scale (default all); per_channel: tokens"
    )
    residual: int | None = Field(
        None, ge=0, description="newest tokens that stay in full precision; default 128 with per_channel, else 0"
    )
    smooth: bool = Field(
        False,
        description="first scale and turn channels of keys against those of queries, found on text: narrower ranges, "
        "the same model",
    )
    key: KVSide = Field(default_factory=KVSide, description="what is different for keys: {format: int8}")
    value: KVSide = Field(default_factory=KVSide, description="what is different for values")

    @field_validator("granularity")
    @classmethod
    def _decided_by_share(cls, granularity: str | None) -> None:
        if granularity is not None:
            raise ValueError("granularity is no choice for a cache: say share: per_head, per_token or per_channel")

    @model_validator(mode="after")
    def _caches(self) -> KVCacheSection:
        if self.shared == "per_tensor" and self.range == "dynamic":
            raise ValueError(
                "share: per_tensor with range: dynamic lets tokens see later ones through the scale: range: static"
            )
        if self.shared != "per_tensor" and self.range != "dynamic":
            raise ValueError(
                f"share: {self.shared} with range: {self.range}: one range is kept for all tokens and heads: "
                "share: per_tensor, or range: dynamic"
            )
        if self.smooth and (self.range != "dynamic" or self.shared == "per_channel"):
            raise ValueError(
                "smooth: true weighs channels of a token with one scale: range: dynamic, share: per_head or per_token"
            )
        if self.shared == "per_channel" and self.group_size is None:
            raise ValueError("share: per_channel groups the tokens of a channel: group_size: 32")
        if self.shared in ("per_token", "per_tensor") and self.group_size is not None:
            raise ValueError(f"group_size with share: {self.shared}: share: per_head or per_channel")
        if self.site == "pre_rope" and (self.shared == "per_channel" or self.window):
            raise ValueError(
                "a window in full precision and groups of tokens are made of rotated keys: site: post_rope"
            )
        for side in (self.key_section(), self.value_section()):
            if side.format in ("ternary", "binary"):
                raise ValueError(f"format: {side.format} is none for a cache: int2 .. int8, fp8_e4m3 or fp8_e5m2")
        return self

    @property
    def shared(self) -> Share:
        """``share``, or its default for the range."""
        return self.share or ("per_head" if self.range == "dynamic" else "per_tensor")

    @property
    def window(self) -> int:
        """``residual``, or its default."""
        if self.residual is not None:
            return self.residual
        return KIVI_RESIDUAL if self.shared == "per_channel" else 0

    def key_section(self) -> QuantizerSection:
        """Options of the keys' quantizer, for rows as ``layouts`` lays them out."""
        return self._side(self.key)

    def value_section(self) -> QuantizerSection:
        """Options of the values' quantizer."""
        return self._side(self.value)

    def _side(self, different: KVSide) -> QuantizerSection:
        options: dict[str, Any] = self.model_dump(include=set(QuantizerSection.model_fields), exclude_unset=True)
        size = options.pop("group_size", None)
        if self.shared == "per_tensor":
            options["granularity"] = "per_tensor"
        elif self.shared == "per_head" and size is not None:
            options |= {"granularity": "per_group", "group_size": size}
        else:
            options["granularity"] = "per_token"
        return QuantizerSection.model_validate(options | different.model_dump(exclude_none=True))
