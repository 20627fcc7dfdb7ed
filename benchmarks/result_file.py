"""Where a table goes: never over one that is there, which may have been written into by hand."""

from __future__ import annotations

from pathlib import Path


def free_name(file: Path) -> Path:
    """``file``, or where that is taken ``NAME-2.md``, ``NAME-3.md``, ..: the first that is free."""
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_stem(f"{file.stem}-{number}")
    return free
