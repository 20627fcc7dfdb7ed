"""The keys of `method.name=qlora`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from qtrain.methods.config import MethodSection


class QLoraOptions(MethodSection):
    """Low-rank adapters over a frozen base in 4, 8 or 16 bits (Dettmers 2023, arXiv 2305.14314)."""

    implementation: ClassVar[str] = "qtrain.methods.qlora.method:QLora"

    base: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4", description="storage of the frozen linears; none keeps them in model.dtype (plain LoRA)"
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
    neftune_alpha: float | None = Field(None, gt=0, description="noise on the embeddings in training (Jain 2023)")
    lora_init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="initial A (B is zero); orthogonal draws both so that their product is zero-mean"
    )

    @model_validator(mode="after")
    def _orthogonal_needs_even_rank(self) -> QLoraOptions:
        if self.lora_init == "orthogonal" and self.r % 2:
            raise ValueError(f"lora_init=orthogonal needs an even rank, r is {self.r}: use method.r={self.r + 1}")
        return self
