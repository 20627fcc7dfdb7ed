"""`alpaca`: an instruction, perhaps an input, and the output (Stanford Alpaca, 2023)."""

from __future__ import annotations

from qtrain.data.formats.record import Conversation, Fields, Turn, text_of
from qtrain.data.formats.registry import Format


class Alpaca(Format):
    """``{"instruction": ..., "input": ..., "output": ..., "system": ...}``; input and system may be absent."""

    keys = "instruction, output (input, system)"

    def fits(self, fields: Fields) -> bool:
        return "instruction" in fields and "output" in fields

    def read(self, fields: Fields) -> Conversation:
        """User turn: the instruction, and the input on the line below it where there is one."""
        prompt = text_of(fields, "instruction")
        if fields.get("input"):
            prompt += "\n" + text_of(fields, "input")
        turns = [Turn("user", prompt), Turn("assistant", text_of(fields, "output"))]
        if fields.get("system"):
            turns.insert(0, Turn("system", text_of(fields, "system")))
        return Conversation(tuple(turns))


ALPACA = Alpaca()
