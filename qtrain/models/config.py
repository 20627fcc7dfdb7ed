"""`model.*`: which weights, stored how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from qtrain.section import Section

DType = Literal["auto", "fp32", "bf16"]


def refuse_fp16(value: object) -> object:
    """fp16 has no key here: its gradients overflow on quantized bases (NF4 needs a scaler and still diverges)."""
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "fp16 overflows in the products over a quantized base; bf16 has fp32's range: use bf16, or fp32 where "
            "the device has no bf16"
        )
    return value


class ModelSection(Section):
    """The base model and how its unquantized weights are stored."""

    path: str | None = Field(
        None, description="hub id, directory, .gguf file, or package:NAME/FILE.gguf inside an installed package"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: DType = Field("auto", description="storage of unquantized weights: auto is bf16 where the device has it")
    attention: str = Field(
        "auto",
        description="attention back end: sdpa, eager, flash_attention_2, ...; auto is sdpa, on a GPU by the fastest of "
        "torch's for the shape, packed rows document by document",
    )
    fused: Literal["auto", "none"] = Field(
        "auto", description="liger-kernel's norm, RoPE and SwiGLU where it is installed and there is a GPU"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless asked for")

    @model_validator(mode="after")
    def _no_kernel_of_the_hub(self) -> ModelSection:
        if "/" in self.attention and not self.trust_remote_code:
            raise ValueError(
                f"attention={self.attention} is compiled code, which transformers would download: with "
                "model.trust_remote_code=true it does"
            )
        return self

    _fp16 = field_validator("dtype", mode="before")(refuse_fp16)
