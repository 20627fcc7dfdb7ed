"""The table of data formats, each in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from qtrain.data.formats.record import Content, Fields
from qtrain.registry import Registry


class Format(ABC):
    """Reads one record of a file as a conversation or a document."""

    keys: ClassVar[str]
    """The keys it needs, as they are told in an error."""

    @abstractmethod
    def fits(self, fields: Fields) -> bool:
        """Whether the record has this format's keys; ``data.format=auto`` takes the first format that fits."""

    @abstractmethod
    def read(self, fields: Fields) -> Content:
        """The record's content; a missing or malformed field is a DataError."""


# Order matters to `auto`: a record with `messages` or `instruction` often carries its rendered `text` as well.
FORMATS: Registry[Format] = Registry(
    "data format",
    {
        "messages": "qtrain.data.formats.messages:MESSAGES",
        "sharegpt": "qtrain.data.formats.sharegpt:SHAREGPT",
        "alpaca": "qtrain.data.formats.alpaca:ALPACA",
        "prompt_completion": "qtrain.data.formats.prompt_completion:PROMPT_COMPLETION",
        "text": "qtrain.data.formats.text:TEXT",
        "tokens": "qtrain.data.formats.tokens:TOKENS",
    },
)
