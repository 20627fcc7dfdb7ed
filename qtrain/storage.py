"""What a disk refuses, as an error that a user can act on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtrain.errors import StorageError

FULL = "no space is left there"
REFUSED = {
    errno.ENOSPC: (FULL, "free some space, or name a directory on another disk"),
    errno.EDQUOT: ("the quota there is used up", "free some space, or name a directory on another disk"),
    errno.EROFS: ("that file system is read-only", "name a directory that can be written"),
    errno.EACCES: ("that may not be written", "name a directory that can be written"),
    errno.EPERM: ("that may not be written", "name a directory that can be written"),
}
UNCHANGED = "what lay there before is unchanged, and a run goes on from its newest checkpoint with run.resume=true"


def storage_error(error: BaseException, path: Path | str | None = None) -> StorageError | None:
    """The error to tell in place of ``error`` where a disk, and no mistake in a program, is behind it; else None.

    Args:
        path: what was being written, where ``error`` does not say so itself.
    """
    found = _number(error)
    if found not in REFUSED:
        return None
    what, fix = REFUSED[found]
    where = path or getattr(error, "filename", None)
    return StorageError(
        f"cannot be written: {what}", where=None if where is None else str(where), rule=UNCHANGED, fix=fix
    )


@contextmanager
def told(path: Path | str) -> Iterator[None]:
    """Raise StorageError for ``path`` in place of what a full or read-only disk raises in the block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or (named := storage_error(error, path)) is None:
            raise
        raise named from error


def _number(error: BaseException | None) -> int | None:
    """The errno behind an error: its own, that of the one it came from, or the one that Rust wrote in its message."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if written := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
            return int(written[1])
        error = error.__cause__ or error.__context__  # torch.save turns the OSError of a file into its own
    return None
