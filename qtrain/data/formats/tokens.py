"""`tokens`: a directory of token shards, which `qtrain generate-data` writes."""

from __future__ import annotations

from qtrain.data.formats.record import Content, Fields
from qtrain.data.formats.registry import Format
from qtrain.errors import DataError


class Tokens(Format):
    """Ids that need no tokenizer. They do not come as records: no record is in this format."""

    keys = "a directory with the manifest.json of `qtrain generate-data`"

    def fits(self, fields: Fields) -> bool:
        return False

    def read(self, fields: Fields) -> Content:
        """Refused."""
        raise DataError("a record of text is not token shards", rule=f"tokens: {self.keys}", fix="data.format=auto")


TOKENS = Tokens()
