"""A progress bar that keeps quiet until a loop proves to be slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
QUIET_SECONDS = 2.0


def progress_over(description: str) -> Callable[[Iterable[T], int], Iterator[T]]:
    """The same for iterators that do not know their length: called with it."""

    def over(items: Iterable[T], total: int) -> Iterator[T]:
        return progress(items, description, total=total)

    return over


def progress(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
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
    task = bar.add_task(description, total=len(items) if isinstance(items, Sized) else total)
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
