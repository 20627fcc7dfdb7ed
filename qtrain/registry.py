"""Names to things that are imported when they are asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Generic, TypeVar

from qtrain.errors import ConfigError

T = TypeVar("T")


def resolve(path: str) -> Any:
    """The object at ``package.module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, else the list of them all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "there is: " + ", ".join(names)


class Registry(Generic[T]):
    """A table from a name to an object or to the ``package.module:attribute`` that holds it.

    Strings are resolved on first use, so that listing names and checking a config import no torch
    (8 s on a cold disk).
    """

    def __init__(self, kind: str, entries: dict[str, str | T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def names(self) -> list[str]:
        """All registered names, in the order of registration."""
        return list(self._entries)

    def register(self, name: str, entry: str | T) -> None:
        """Add one entry; a name that is taken is an error."""
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered already", fix="choose another name")
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """The entry of that name, imported if need be."""
        if name not in self._entries:
            rule = f"{self.kind}: {', '.join(self._entries)}"
            raise ConfigError(f"{name!r} is no {self.kind}", rule=rule, fix=did_you_mean(name, self._entries))
        entry = self._entries[name]
        if isinstance(entry, str):
            resolved: T = resolve(entry)
            self._entries[name] = resolved
            return resolved
        return entry
