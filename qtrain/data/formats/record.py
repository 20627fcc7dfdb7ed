"""What every format turns a record into: a conversation or a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.errors import DataError

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is system, user, assistant or tool; ``trained=False`` masks it whatever its role."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, and the tools that were offered to the assistant (as JSON schemas)."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Document:
    """Plain text. ``ends=False``: a piece of a longer text, after which no end-of-text token belongs."""

    text: str
    ends: bool = True


Content = Conversation | Document


def text_of(fields: Fields, key: str) -> str:
    """The string under ``key``; a missing key or another type is a DataError."""
    if key not in fields:
        raise DataError(f"no key {key!r}", rule="keys of this sample: " + ", ".join(map(str, fields)))
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {_kind(value)}", rule=f"{key!r} must be a string")
    return checked(value, key)


def checked(text: str, key: str) -> str:
    """The text; half a surrogate pair, which JSON can hold and no tokenizer takes, is a DataError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{key!r} holds half a character at {error.start}: {text[error.start]!r}",
            rule="text is Unicode: a surrogate comes with its other half",
            fix="text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') writes it whole",
        ) from None
    return text


def list_of(fields: Fields, key: str) -> list[Fields]:
    """The list of objects under ``key``; anything else, or an empty list, is a DataError."""
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        shown = "empty" if value == [] else _kind(value) if key in fields else "missing"
        raise DataError(f"{key!r} is {shown}", rule=f"{key!r} must be a list of objects, one a turn")
    return value


def tools_of(fields: Fields) -> tuple[Any, ...]:
    """The tool schemas under ``tools``: a list, or a string of JSON; null, "" and [] are no tools."""
    value = fields.get("tools")
    if not value:
        return ()
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"'tools' is not JSON: {error}", rule="a list of tool schemas") from None
    return tuple(tools) if isinstance(tools, list) else (tools,)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
