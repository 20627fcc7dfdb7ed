"""`generate_data.*`: texts that a model writes for its own distillation."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from qtrain.section import Section


class GenerateDataSection(Section):
    """Data-free generation: a first token, a few greedy ones, the rest sampled (Liu 2023, arXiv 2305.17888)."""

    tokens: int = Field(10_000_000, ge=1, description="how many in all, rounded up to whole rows")
    length: int = Field(512, ge=2, description="tokens in a row; rows are full, without padding")
    greedy_lengths: list[int] = Field([3, 4, 5], description="a text is decoded greedily until it has so many tokens")
    temperature: float = Field(1.0, gt=0, description="of the sampling; below 1 is sharper")
    top_k: int = Field(
        0,
        ge=0,
        description="sample among the k likeliest tokens; 0 is all: with 50 a text is narrower than what people write",
    )
    batch_size: int = Field(512, ge=1, description="rows decoded together")
    shard_tokens: int = Field(4_000_000, ge=1, description="tokens in a file; a stopped run goes on with the next file")
    seed: int = Field(0, ge=0, description="of first tokens and sampling")
    dir: str | None = Field(None, description="where the files go; default: RUN/tokens")

    @field_validator("greedy_lengths")
    @classmethod
    def _at_least_the_first_token(cls, lengths: list[int]) -> list[int]:
        if not lengths or min(lengths) < 1:
            raise ValueError("lengths of 1 or more are wanted: the first token is given")
        return lengths

    @model_validator(mode="after")
    def _fits_a_row(self) -> GenerateDataSection:
        if max(self.greedy_lengths) > self.length:
            raise ValueError(f"greedy_lengths go up to {max(self.greedy_lengths)}, a row has {self.length} tokens")
        return self

    @property
    def rows(self) -> int:
        """Rows in all."""
        return -(-self.tokens // self.length)

    @property
    def shard_rows(self) -> int:
        """Rows in a file."""
        return max(1, self.shard_tokens // self.length)
