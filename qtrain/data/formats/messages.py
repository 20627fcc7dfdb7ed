"""`messages`: `role` / `content`, as chat templates and the OpenAI API spell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtrain.data.formats.record import Conversation, Fields, Turn, checked, list_of, text_of, tools_of
from qtrain.data.formats.registry import Format
from qtrain.errors import DataError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
FLAGS = ("loss_weight", "weight", "train")


class Messages(Format):
    """``{"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}``.

    Content is a string or a list of ``{"type": "text", "text": ...}`` parts (``value`` is read too), which are joined.
    ``loss_weight``, ``weight`` or ``train`` of a message, 0 or 1: 0 masks it.
    """

    keys = "messages (tools)"

    def fits(self, fields: Fields) -> bool:
        return "messages" in fields

    def read(self, fields: Fields) -> Conversation:
        turns = []
        for message in list_of(fields, "messages"):
            role = text_of(message, "role")
            if role not in ROLES:
                raise DataError(f"role={role!r} is no role", rule="roles: " + ", ".join(ROLES))
            turns.append(Turn(ROLES[role], _content(message), _trained(message)))
        return Conversation(tuple(turns), tools_of(fields))


def _content(message: Fields) -> str:
    content = message.get("content")
    if message.get("tool_calls"):
        raise DataError("a message has 'tool_calls'", rule="calls are read as text", fix="put the call into 'content'")
    if not isinstance(content, list):
        return text_of(message, "content")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    text = part.get("text", part.get("value")) if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            "a part of 'content' is not text",
            rule='parts are {"type": "text", "text": ...}; a text model reads no other',
        )
    return checked(text, "content")


def _trained(message: Fields) -> bool:
    for flag in FLAGS:
        value = message.get(flag)
        if value is not None and value not in (0, 1):
            raise DataError(f"{flag}={value!r}", rule="0 masks the message, 1 trains it; there is nothing in between")
        if value is not None:
            return bool(value)
    return True


MESSAGES = Messages()
