"""`generate.*`: how text is decoded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qtrain.section import Section


class GenerateSection(Section):
    """Decoding: greedy, beam or sampled."""

    prompt: str | list[str] | None = Field(None, description="what to continue or answer; a list gives several")
    chat: bool | None = Field(None, description="wrap the prompt in the chat template; default: if there is one")
    strategy: Literal["greedy", "beam", "sample"] = Field("greedy", description="how the next token is chosen")
    max_new_tokens: int = Field(128, ge=1, description="tokens to add at most")
    num_beams: int = Field(4, ge=2, description="beams of the beam search")
    temperature: float = Field(1.0, gt=0, description="of the sampling; below 1 is sharper")
    top_k: int = Field(50, ge=0, description="sample among the k likeliest tokens; 0 is all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample within this share of the probability")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 makes tokens seen before less likely")
    seed: int = Field(0, ge=0, description="of the sampling")
    beside: str | None = Field(None, description="a second model (as model.path) whose answers stand beside")
