"""Exports that go on where they were stopped: what is not finished waits, out of sight, beside where it will lie."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtrain.errors import ExportError, QtrainError, StorageError
from qtrain.files import atomic_directory, replace_directory, write_text
from qtrain.storage import told

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """An export that is being written.

    Attributes:
        files: the directory that it will be.
        journal: where its writer notes what is finished, outside of ``files``; None where nobody will go on with it.
    """

    files: Path
    journal: Path | None = None


@contextmanager
def partial_export(path: Path, key: str | None) -> Iterator[Partial]:
    """Yield a directory that replaces ``path`` when the block ends without an error; ``path`` is whole at all times.

    Stopped in any way, it stays as ``.NAME.partial`` beside ``path``, and the next one with the same key goes on with
    it; one of another key is let go, and so is what an error in the input (``QtrainError``) has stopped.

    Args:
        key: of all that decides what is written; None: begin anew each time, and leave nothing behind.

    Raises:
        ExportError: another process writes there.
    """
    if key is None:
        with atomic_directory(path) as temporary:
            yield Partial(temporary)
        return
    kept = path.with_name(f".{path.name}.partial")
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, however the process ends
        except OSError:
            raise ExportError(
                "another process is writing this export", where=str(path), fix="wait for it, or export.dir=ANOTHER"
            ) from None
        partial = Partial(kept / "files", kept / "journal.json")
        _begin(partial, kept / "key", key)
        try:
            with told(path):
                yield partial
                replace_directory(partial.files, path)
        except StorageError:  # once there is room, the next one goes on
            raise
        except QtrainError:
            shutil.rmtree(kept)
            raise
        shutil.rmtree(kept)


def _begin(partial: Partial, written: Path, key: str) -> None:
    known = written.read_text(encoding="utf-8") if written.is_file() else None
    if known != key:
        if known is not None:
            log.info("an unfinished export of another run or other options is let go: %s", written.parent)
        shutil.rmtree(partial.files, ignore_errors=True)
        assert partial.journal is not None
        partial.journal.unlink(missing_ok=True)
        write_text(written, key)
    partial.files.mkdir(exist_ok=True)
