"""From `data.train` and its siblings to files and hub ids, checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qtrain.data.config import DataSection
from qtrain.data.tokens.manifest import NAME, has_manifest, read_complete
from qtrain.errors import DataError, QtrainError
from qtrain.package_files import PREFIX, package_file
from qtrain.paths import unreachable

SPLITS = ("train", "validation", "test", "predict")
TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", *TEXT_SUFFIXES)

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:\[(?P<config>[^\]]+)\])?(?::(?P<split>.+))?")
_FILE_LIKE = re.compile(r"\.[A-Za-z]\w*$")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub: ``name``, ``name:split`` or ``name[config]:split``."""

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"[{self.config}]" if self.config else ""
        return self.name + config + (f":{self.split}" if self.split else "")


@dataclass(frozen=True)
class TokenDirectory:
    """A directory of token shards."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Location = Path | HubSet | TokenDirectory


def locate(entry: str) -> list[Location]:
    """The files of one entry, or its hub id; a directory stands for all its data files, in the order of their names.

    A directory with the manifest of token shards is those shards, whatever else lies there. Files called README and
    hidden ones are not data; ``package:NAME/FILE`` is a file of an installed package.

    Errors: QtrainError.
    """
    path = package_file(entry) if entry.startswith(PREFIX) else Path(entry).expanduser()
    if reason := unreachable(path):
        raise DataError(
            f"it cannot be looked at: {reason}",
            where=entry[:100],
            rule="a file, a directory, package:NAME/FILE or a hub id",
            fix="check the path; several files are a list: [FILE,FILE]",
        )
    if path.is_dir():
        return [TokenDirectory(path)] if has_manifest(path) else list(_files_in(path))
    if path.is_file():
        return [_checked(path)]
    if os.path.lexists(path):
        raise DataError(
            "neither a file nor a directory",
            where=entry,
            rule="data is read more than once: no pipe, no device, no link to nothing",
            fix="write it to a file first",
        )
    hub = _HUB_ID.fullmatch(entry)
    looks_local = _FILE_LIKE.search(path.name) or (path.parent != Path() and path.parent.is_dir())
    if hub is None or looks_local or entry.startswith("."):
        raise DataError(
            "no such file or directory",
            where=entry,
            rule="a file, a directory, package:NAME/FILE or a hub id",
            fix=_near(path),
        )
    return [HubSet(hub["name"], hub["config"], hub["split"])]


def locate_all(source: str | list[str] | None) -> list[Location]:
    """The files and hub ids of a whole key, in the order given."""
    entries = [source] if isinstance(source, str) else source or []
    return [location for entry in entries for location in locate(entry)]


def check_sources(section: DataSection) -> list[DataError]:
    """Everything wrong with sources and template file that can be told without reading them, by its key."""
    errors = []
    for split in SPLITS:
        source = getattr(section, split)
        if source is not None and not source:
            rule = "a file, a directory, package:NAME/FILE or a hub id"
            errors.append(DataError("it names nothing", where=f"data.{split}", rule=rule, fix=f"data.{split}=null"))
        for entry in [source] if isinstance(source, str) and source else source or []:
            try:
                for location in locate(entry):
                    _check_use(location, split, section)
            except QtrainError as error:
                where = f"data.{split}={error.where}"
                errors.append(DataError(error.what, where=where, rule=error.rule, fix=error.fix))
    template = section.chat_template
    if template not in (None, "chatml") and not Path(template).expanduser().is_file():
        fix = f"chatml, or a Jinja file; {_near(Path(template))}"
        errors.append(DataError("no such file", where=f"data.chat_template={template}", fix=fix))
    return errors


def _check_use(location: Location, split: str, section: DataSection) -> None:
    """Token shards where ids will do, and nothing else where data.format=tokens asks for them."""
    if isinstance(location, TokenDirectory):
        read_complete(location.path)
        if split == "predict":
            raise DataError(
                "token shards hold no prompts", where=str(location), fix="data.predict=FILE with chats or text"
            )
        if split == "train" and section.streaming:
            raise DataError(
                "token shards are not streamed", where=str(location), rule="5 bytes a token", fix="data.streaming=false"
            )
    elif section.format == "tokens":
        raise DataError(
            "no token shards",
            where=str(location),
            rule="data.format=tokens: each split is a directory with the manifest.json of `qtrain generate-data`",
            fix="data.format=auto, which knows such a directory among other data",
        )


def _files_in(directory: Path) -> list[Path]:
    files = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and path.suffix.lower() in SUFFIXES
        and path.stem.upper() != "README"
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    below = next((file.parent for file in files if file.name == NAME and has_manifest(file.parent)), None)
    if below:
        rule = "a directory is token shards, or files of text and chats"
        fix = f"name that one: {below}"
        raise DataError("token shards lie in a directory below", where=str(directory), rule=rule, fix=fix)
    if not files:
        raise DataError(
            "the directory has no data files",
            where=str(directory),
            rule="data files end in " + ", ".join(SUFFIXES),
            fix="another directory, or a file in it by its name",
        )
    return [_checked(file) for file in files]


def _checked(path: Path) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"unknown suffix {path.suffix!r}",
            where=str(path),
            rule="data files end in " + ", ".join(SUFFIXES),
            fix="a name that says what it holds; pickle is never read",
        )
    if path.stat().st_size == 0:
        raise DataError(
            "the file is empty",
            where=str(path),
            rule="a data file holds at least one sample",
            fix="write it again, or name another one",
        )
    return path


def _near(path: Path) -> str:
    """The nearest name in the directory, else the nearest directory there is."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return f"there is no directory {path.parent}; the nearest that exists is {parent.resolve()}"
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    stems = {name.partition(".")[0]: name for name in names}
    near = difflib.get_close_matches(path.name, names, n=1) or [
        stems[stem] for stem in difflib.get_close_matches(path.stem, stems, n=1)
    ]
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"a file in {parent.resolve()}, or a hub id: name, name:split, name[config]:split"
