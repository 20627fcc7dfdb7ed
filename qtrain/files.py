"""Writes that leave either the old file or the new one, never half of either."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtrain.errors import CheckpointError, QtrainError
from qtrain.storage import told

EXCHANGE = 2
"""``RENAME_EXCHANGE`` of Linux' renameat2."""
HERE = -100
"""``AT_FDCWD``."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes its place when the block ends without an error.

    Raises:
        StorageError: the disk is full, or cannot be written; ``path`` is what it was.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes files that only the owner reads; an ordinary file obeys the umask.
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path``; it replaces ``path`` when the block ends without an error.

    Raises:
        StorageError: the disk is full, or cannot be written; ``path`` is what it was.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield temporary
            replace_directory(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(finished: Path, path: Path) -> None:
    """Put a finished directory in the place of ``path``, its files safe on the disk and readable as the umask says."""
    finished.chmod(0o777 & ~_umask())
    for file in finished.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())  # some libraries write files that only the owner reads
            _sync(file)
    if path.exists() and _exchange(finished, path):
        shutil.rmtree(finished, ignore_errors=True)  # by now the old one
        return
    aside = _step_aside(path)
    os.replace(finished, path)
    shutil.rmtree(aside, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Let go of a directory in one step: a process that is killed meanwhile leaves all of it or nothing in sight."""
    shutil.rmtree(_step_aside(path), ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove the unfinished files that a killed process left, hidden, in a directory that nobody else writes to."""
    for left in directory.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    else:
        if isinstance(content, dict):
            return content
        reason = f"it holds {str(content)[:40]}"
    raise CheckpointError(
        f"it cannot be read: {reason}",
        where=str(path),
        rule="a file of figures is one JSON object, as qtrain wrote it",
        fix=f"restore it, or remove it: rm {path}",
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically.

    Raises:
        QtrainError: NaN or inf in it, which JSON cannot hold.
    """
    if wrong := next(_not_finite(content), None):
        raise QtrainError(
            f"{wrong[0]} is {wrong[1]}",
            where=str(path),
            rule="figures are finite numbers",
            fix="look for NaN or inf in the weights of model.path; where training made them, a lower optimizer.lr",
        )
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _not_finite(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, float) and not math.isfinite(content):
        yield place.lstrip("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _not_finite(value, f"{place}.{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _not_finite(value, f"{place}[{number}]")


def _step_aside(path: Path) -> Path:
    aside = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.replace(path, aside)
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in a single step; False where the system or its file system cannot (macOS, NFS).

    A rename cannot replace a filled directory: without this there is a moment in which neither is in its place.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and not renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
