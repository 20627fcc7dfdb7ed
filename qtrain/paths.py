"""Names of files before anything is opened."""

from __future__ import annotations

from pathlib import Path


def unreachable(path: Path) -> str | None:
    """Why the system does not say what lies there: the name is too long, has a zero byte, is a link in a circle; None
    where it does, or says that nothing does.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
