"""The keys of `method.name=qlora`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from qtrain.methods.config import KEPT, MethodSection
from qtrain.methods.packed.config import PackedKeys


class PackingSection(PackedKeys):
    """`method.packed.*`: the integers of base=packed."""

    place: ClassVar[str] = "method.packed"


class QLoraOptions(MethodSection):
    """Low-rank adapters over a frozen base in 2 to 16 bits (Dettmers 2023, arXiv 2305.14314)."""

    implementation: ClassVar[str] = "qtrain.methods.qlora.method:QLora"

    codes_key: ClassVar[str | None] = "base"
    takes_codebooks: ClassVar[bool] = True
    takes_fp8: ClassVar[bool] = True

    base: Literal["nf4", "fp4", "int8", "packed", "checkpoint", "none"] = Field(
        "nf4",
        description="storage of the frozen linears; packed: integers by method.packed; checkpoint: the codes that "
        "model.path holds; none keeps them in model.dtype (plain LoRA)",
    )
    packed: PackingSection | None = Field(
        None, description="which integers, and what chooses them: of base=packed alone"
    )
    double_quant: bool = Field(True, description="quantize the block scales too: 4.127 bits a weight in place of 4.5")
    r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="the adapters' product is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear (lm_head excluded), or names of layers to adapt"
    )
    rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)")
    dora: bool = Field(False, description="train magnitude and direction apart (Liu 2024)")
    loraplus_ratio: float | None = Field(None, ge=1, description="learning rate of B over that of A (Hayou 2024)")
    fused_blocks: Literal["auto", "none"] = Field(
        "auto",
        description="linears that share an input, and gated MLPs, run as one function that keeps less for the "
        "backward; none: as PEFT has them",
    )
    neftune_alpha: float | None = Field(None, gt=0, description="noise on the embeddings in training (Jain 2023)")
    lora_init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="initial A (B is zero); orthogonal draws both so that their product is zero-mean"
    )

    @model_validator(mode="before")
    @classmethod
    def _packed_as_resolved(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") == "packed" and values.get("packed") is None:
            return values | {"packed": {}}
        return values

    @model_validator(mode="after")
    def _packed_alone(self) -> QLoraOptions:
        if self.packed is not None and self.base != "packed":
            raise ValueError(
                f"packed: its keys choose the integers of method.base=packed, and base is {self.base}: set that, or "
                "method.packed=null"
            )
        if self.packed is not None and self.packed.init == KEPT:
            raise ValueError(f"packed.init={KEPT}: method.base={KEPT} keeps the codes that model.path holds")
        return self

    @model_validator(mode="after")
    def _fp8_in_blocks(self) -> QLoraOptions:
        if self.compute_dtype == "fp8" and (self.fused_blocks == "none" or self.dora or self.base == "int8"):
            raise ValueError(
                "compute_dtype=fp8 runs in fused blocks, which fused_blocks=none turns off, dora=true has none of, and "
                "base=int8 multiplies bytes in: drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _orthogonal_needs_even_rank(self) -> QLoraOptions:
        if self.lora_init == "orthogonal" and self.r % 2:
            raise ValueError(f"lora_init=orthogonal needs an even rank, r is {self.r}: use method.r={self.r + 1}")
        return self
