"""`data.*`: files, their format, and how samples become rows of tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from qtrain.data.formats.registry import FORMATS
from qtrain.registry import did_you_mean
from qtrain.section import Section

Source = str | list[str] | None


class DataSection(Section):
    """What is trained and measured on."""

    train: Source = Field(
        None, description="file, directory, package:NAME/FILE, hub id (name, name:split, name[config]:split), or a list"
    )
    validation: Source = Field(None, description="the same, for the held-out loss")
    test: Source = Field(None, description="the same, for `qtrain test`")
    predict: Source = Field(None, description="the same, for `qtrain predict`")
    format: str = Field("auto", description="auto, text, alpaca, sharegpt, messages, prompt_completion or tokens")
    columns: dict[str, str] = Field(
        default_factory=dict, description="renames: {prompt: question} reads the field `question` as prompt"
    )
    train_on: Literal["assistant", "all"] = Field("assistant", description="tokens that carry the loss in chats")
    chat_template: str | None = Field(None, description="chatml, or a Jinja file; default: the tokenizer's own")
    max_length: int = Field(1024, ge=8, description="tokens in a row; longer chats are cut, longer texts split")
    packing: bool = Field(True, description="several samples in a row, isolated exactly; false pads instead")
    streaming: bool = Field(False, description="read `train` as training goes on, for what does not fit in memory")
    batch_size: int = Field(4, ge=1, description="rows in a micro-batch")
    eval_batch_size: int | None = Field(None, ge=1, description="the same without gradients; default: batch_size")
    shuffle: bool = Field(True, description="a new order each epoch, decided by run.seed")
    workers: int = Field(0, ge=0, description="processes that prepare batches")

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        known = ["auto", *FORMATS.names()]
        if name not in known:
            raise ValueError(f"no such data format; {did_you_mean(name, known)}")
        return name
