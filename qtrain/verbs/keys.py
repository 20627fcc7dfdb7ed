"""`qtrain VERB --help`: the keys that a verb reads, with type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from qtrain.config.problems import section_of, shown, type_name
from qtrain.config.schema import TASKS, RunConfig
from qtrain.config.trainer_args import OWNED, trainer_arguments
from qtrain.console import say
from qtrain.registry import resolve
from qtrain.verbs.table import VERBS


class Row(NamedTuple):
    """One key: its path, ``text = null`` and what it means."""

    path: str
    value: str
    meaning: str


def print_keys(verb: str, words: Sequence[str]) -> None:
    """List the keys of ``verb``, of the task that ``words`` name."""
    entry = VERBS.get(verb)
    say(f"qtrain {verb} {entry.usage}\n{entry.help}")
    if entry.options:
        _print(list(rows_of(resolve(entry.options), verb)), verb)
    chosen = [word.partition("=")[2] for word in words if word.startswith("task=")]
    schema: type[RunConfig] = TASKS.get(chosen[-1] if chosen else entry.tasks[0])
    if len(entry.tasks) > 1:
        task = schema.model_fields["task"]
        others = ", ".join(f"task={other} --help" for other in entry.tasks if other != task.default)
        _print([Row("task", f"{'|'.join(entry.tasks)} = {task.default}", f"{task.description}; other keys: {others}")])
    for section in (name for name in entry.sections if name in schema.model_fields):
        if section == "trainer":
            names = sorted(trainer_arguments().keys() - OWNED.keys())
            say("  " + ", ".join(names), title="trainer.*  (arguments of lightning.Trainer)")
        elif section in schema.tagged:
            _print_tagged(section, schema)
        else:
            annotation = schema.model_fields[section].annotation
            assert isinstance(annotation, type)
            _print(list(rows_of(annotation, section)), section)


def rows_of(model: type[BaseModel], prefix: str) -> Iterator[Row]:
    """Keys of a section; those of sections within it follow them, where they are no others' again."""
    seen: dict[Row, str] = {}
    for key, info in model.model_fields.items():
        path, inner = f"{prefix}.{key}", section_of(info)
        default = info.get_default(call_default_factory=True)
        text = "required" if default is PydanticUndefined else shown(default)
        meaning = info.description or ""
        found = list(rows_of(inner, path)) if inner is not None else []
        fresh = [row for row in found if row._replace(path=row.path.removeprefix(path)) not in seen]
        if len(fresh) < len(found):
            known = next(row._replace(path=row.path.removeprefix(path)) for row in found if row not in fresh)
            meaning += f"; keys as those of {seen[known]}" + (", and:" if fresh else "")
        for row in fresh:
            seen.setdefault(row._replace(path=row.path.removeprefix(path)), path)
        yield Row(path, f"{type_name(info.annotation)} = {text}", meaning)
        yield from fresh


def _print_tagged(section: str, schema: type[RunConfig]) -> None:
    """A block for each class that the section may have, with the keys that no block before it had."""
    registry, tag = schema.tagged[section]
    known: set[str] = set()
    for name in registry.names():
        rows = [row for row in rows_of(registry.get(name), section) if row.path not in known]
        known |= {row.path for row in rows}
        which = f"{'|'.join(registry.names())} = {registry.names()[0]}"
        rows = [row._replace(value=which) if row.path == f"{section}.{tag}" else row for row in rows]
        if rows:
            _print(rows, f"{section}  ({tag}={name})")


def _print(rows: Sequence[Row], title: str | None = None) -> None:
    width = max(len(row.path) for row in rows)
    lines = (f"  {row.path:<{width}}  {row.value}\n  {'':<{width}}  {row.meaning}" for row in rows)
    say(lines, title=title or rows[0].path)
