"""Keys of the config that are not the same in all of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qtrain.config.schema import TASKS
from qtrain.report.compared import ComparedRun
from qtrain.report.comparison import NONE

NAMES = {"recipe", "run.name", "run.dir", "run.resume", "run.overwrite"}
"""What a run is called, which is not what it did; a recipe's keys are there one by one."""


def differing_keys(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run, a dash where that run has no such key), in the order of the first config.

    A key that only some methods or formats have stands there where its value is not the default of that method.
    """
    configs = [dict(_flat(run.settings)) for run in runs]
    defaults = [_tagged_defaults(run.settings) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NAMES)
    found = []
    for key in keys:
        values = [config.get(key, NONE) for config in configs]
        if len(set(values)) == 1:
            continue
        if NONE in values and all(
            value == NONE or value == default.get(key) for value, default in zip(values, defaults, strict=True)
        ):
            continue
        found.append((key, values))
    return found


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}.")
        else:
            yield path, _written(value)


def _written(value: Any) -> str:
    """As one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_written, value)) + "]"
    return str(value)


def _tagged_defaults(settings: Mapping[str, Any]) -> dict[str, str]:
    """Defaults of the sections whose class a key of theirs chooses, as far as this version of qtrain knows it."""
    found: dict[str, str] = {}
    task = settings.get("task", "language")
    if task not in TASKS.names():
        return found
    for section, (registry, tag) in TASKS.get(task).tagged.items():
        values = settings.get(section)
        name = values.get(tag) if isinstance(values, dict) else None
        if name in registry.names():
            found |= _flat({section: registry.get(name)().model_dump(mode="json")})
    return found
