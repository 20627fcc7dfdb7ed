"""SIGINT and SIGTERM as an exception with an exit status, and as a wish that is met at a better moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal has ended the work; like KeyboardInterrupt, no error that anybody should handle on the way.

    Args:
        number: of the signal.
        what: what was saved, and how to go on.
    """

    def __init__(self, number: int, what: str = "nothing was saved") -> None:
        self.number = number
        super().__init__(f"{signal.Signals(number).name}: {what}")

    @property
    def status(self) -> int:
        """Of the process: 130 for SIGINT, 143 for SIGTERM, as shells have it."""
        return 128 + self.number


@contextmanager
def answering(answer: Callable[[int], None]) -> Iterator[None]:
    """Call ``answer`` with the number of the first SIGINT or SIGTERM; the second one ends the process at once.

    Signals that were ignored stay so (a job in the background of a script ignores SIGINT). Outside of the main thread,
    where Python takes no handlers, nothing changes.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's worker: its parent decides
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        for each in earlier:
            signal.signal(each, signal.SIG_DFL)
        answer(number)

    earlier: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        earlier = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in earlier:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped where the first SIGINT or SIGTERM finds the program."""

    def stop(number: int) -> None:
        raise Stopped(number)

    with answering(stop):
        yield
