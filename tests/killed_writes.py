"""Run in a process of its own, without torch: each way of writing, killed at each of its steps, and what lay there.

Prints, for each way, how many kills there were and all that a reader could see after them.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qtrain import files
from qtrain.data.tokens.manifest import Manifest, Origin
from qtrain.data.tokens.shards import ShardWriter, read_shards

STEPS = ("replace", "fsync", "unlink", "rmdir", "mkdir", "chmod")
ORIGIN = Origin(model="m", tokenizer_size=9, length=4, shard_rows=2, seed=0, options={})


def text(folder: Path, content: str) -> None:
    files.write_text(folder / "a", content * 9)


def directory(folder: Path, content: str) -> None:
    with files.atomic_directory(folder / "d") as whole:
        for name in "xy":
            (whole / name).write_text(content * 9)


def nested(folder: Path, content: str) -> None:
    """As `fit` writes an adapter with its tokenizer beside it."""
    with files.atomic_directory(folder / "d") as whole:
        with files.atomic_directory(whole) as inner:
            (inner / "x").write_text(content * 9)
        (whole / "y").write_text(content * 9)


def remove(folder: Path, content: str) -> None:
    """An earlier run gives way."""
    files.remove_directory(folder / "d")


def without_exchange(folder: Path, content: str) -> None:
    """On a file system that cannot swap two directories."""
    files._exchange = lambda one, other: False
    directory(folder, content)


def shards(folder: Path, content: str) -> None:
    writer = ShardWriter(folder, Manifest(model_path="m", dtype="uint16", origin=ORIGIN))
    for number, rows in writer.pending(6):
        writer.write(number, np.full((rows, 4), number))
    writer.finish({})


def seen(folder: Path) -> Any:
    """What a reader finds: hidden files are nobody's business."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[str(name)] = path.read_text()[:3]
    return found


def seen_shards(folder: Path) -> Any:
    if not (folder / "manifest.json").exists():
        return "none"
    manifest = ShardWriter(folder, Manifest(model_path="m", dtype="uint16", origin=ORIGIN)).manifest
    return [ids.tolist() for ids in read_shards(folder, manifest)] and "whole"


WAYS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], Any]]] = {
    "file": (text, seen),
    "directory": (directory, seen),
    "nested": (nested, seen),
    "remove": (remove, seen),
    "without exchange": (without_exchange, seen),
    "shards": (shards, seen_shards),
}


def die_at(last: int) -> None:
    """Kill this process at its ``last``-th step from now on."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return step

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def main(folder: Path) -> None:
    told = {}
    for way, (write, look) in WAYS.items():
        last, status, states = 0, None, set()
        while status != 0:
            last += 1
            at = folder / f"{way}-{last}"
            at.mkdir()
            if way != "shards":
                (directory if way == "remove" else write)(at, "old")
            child = os.fork()
            if child == 0:
                die_at(last)
                write(at, "new")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            states.add(json.dumps(look(at)))
            files.sweep(at)
            assert not [path for path in at.iterdir() if path.name.startswith(".")]
            write(at, "new")  # what is left is in nobody's way
        told[way] = {"kills": last - 1, "seen": sorted(states), "end": json.dumps(look(at))}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
