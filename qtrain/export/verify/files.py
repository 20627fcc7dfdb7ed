"""The files of weights and their index: each whole, each tensor once and where the index says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qtrain.errors import ExportError

INDEX = "model.safetensors.index.json"
WHOLE = "every file of weights is there and whole"


def file_problems(directory: Path) -> Iterator[ExportError]:
    """What is wrong with ``*.safetensors`` and ``model.safetensors.index.json``; headers are read, no tensor is.

    A file that was cut is known by its header, which says how long it is.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        yield ExportError("no *.safetensors", where=str(directory), rule=WHOLE)
    held: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            yield ExportError(f"it cannot be read: {error}", where=str(path), rule=WHOLE)
            continue
        for name in names:
            if name in held:
                yield ExportError(f"{name} is in {held[name]} too", where=str(path), rule="a tensor is stored once")
            held[name] = path.name
    index = directory / INDEX
    if index.is_file():
        yield from _index_problems(index, held, [path.name for path in paths])
    elif len(paths) > 1:
        yield ExportError(f"{len(paths)} files and no index", where=str(directory), rule=f"{INDEX} names their tensors")


def _index_problems(index: Path, held: dict[str, str], files: list[str]) -> Iterator[ExportError]:
    rule = "the index names the file of every tensor"
    try:
        promised = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield ExportError(f"it is no index: {error!r}", where=str(index), rule=rule)
        return
    for name, file in promised.items():
        if held.get(name) != file:
            where = f"lies in {held[name]}" if name in held else "lies in no file"
            yield ExportError(f"{name} is promised in {file} and {where}", where=str(index), rule=rule)
    for name in held.keys() - promised.keys():
        yield ExportError(f"{name} of {held[name]} is not in it", where=str(index), rule=rule)
    for file in sorted(set(files) - set(promised.values())):
        yield ExportError(f"{file} is not in it", where=str(index), rule="no other files of weights lie beside it")


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    found = {}
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.gguf")]):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def changed_files(directory: Path, written: Mapping[str, str]) -> Iterator[ExportError]:
    """Files of weights that are not, byte by byte, what was written: for codes that no run can give again."""
    there = digests(directory)
    for name in sorted(there.keys() | written.keys()):
        if there.get(name) != written.get(name):
            yield ExportError(
                "its bytes are not those that were written",
                where=str(directory / name),
                rule="codes that were chosen at the export are known by the file's SHA-256",
            )
