"""`text`: one document a record."""

from __future__ import annotations

from qtrain.data.formats.record import Document, Fields, text_of
from qtrain.data.formats.registry import Format


class Text(Format):
    """``{"text": ...}``."""

    keys = "text"

    def fits(self, fields: Fields) -> bool:
        return "text" in fields

    def read(self, fields: Fields) -> Document:
        return Document(text_of(fields, "text"))


TEXT = Text()
