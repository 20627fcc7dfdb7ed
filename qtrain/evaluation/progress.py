"""A progress bar that keeps quiet until a loop proves to be slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
QUIET_SECONDS = 2.0


def progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Yield ``items``; after two seconds a bar with the remaining time appears on stderr, if that is a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(description, total=len(items) if isinstance(items, Sized) else None)
    begin, shown = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - begin > QUIET_SECONDS:
                bar.start()
                shown = True
    finally:
        bar.stop()
