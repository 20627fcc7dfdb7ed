"""`sharegpt`: `conversations` of `from` / `value`, with tool calls and what the tools returned."""

from __future__ import annotations

from qtrain.data.formats.record import Conversation, Fields, Turn, list_of, text_of, tools_of
from qtrain.data.formats.registry import Format
from qtrain.errors import DataError

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


class ShareGpt(Format):
    """``{"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}``.

    A ``function_call`` is an assistant turn whose content is the call as it stands; an ``observation`` is a tool turn.
    """

    keys = "conversations (system, tools)"

    def fits(self, fields: Fields) -> bool:
        return "conversations" in fields

    def read(self, fields: Fields) -> Conversation:
        turns = []
        for message in list_of(fields, "conversations"):
            role = text_of(message, "from")
            if role not in ROLES:
                raise DataError(f"from={role!r} is no role", rule="roles: " + ", ".join(ROLES))
            turns.append(Turn(ROLES[role], text_of(message, "value")))
        if fields.get("system"):
            turns.insert(0, Turn("system", text_of(fields, "system")))
        return Conversation(tuple(turns), tools_of(fields))


SHAREGPT = ShareGpt()
