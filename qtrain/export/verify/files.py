"""The files of weights and their index: each whole, each tensor once and where the index says."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
