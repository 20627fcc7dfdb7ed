"""A .gguf file's header held against the file's length, before any library believes its counts."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qtrain.errors import ModelError

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
SHORTEST = {"tensor": 8 + 4 + 4 + 8, "value": 8 + 4 + 1}
ALIGNMENT = "general.alignment"


def check_gguf(path: Path) -> None:
    """Walk over keys and tensors: every count, length and offset ends within the file.

    Takes no more than the file's header in time, and no memory: readers that trust a count of 2^40 values run for ever.

    Raises:
        ModelError: with the first one that does not.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24:
            raise _broken(path, f"it has {size} bytes, and a header alone takes 24")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Walk(path, content).check()
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise _broken(path, f"its header ends in the middle: {error}") from None


class _Walk:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.size, self.place = path, content, len(content), 0

    def check(self) -> None:
        magic, self.place = self.content[:4], 4
        version, tensors, values = self.take("IQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise _broken(
                self.path, f"it begins with {magic!r}, version {version}", "GGUF 2 and 3, little-endian, are read"
            )
        for what, count in (("tensor", tensors), ("value", values)):
            if count * SHORTEST[what] > self.size:
                raise _broken(self.path, f"it promises {count:,} {what}s in {self.size:,} bytes")
        alignment = 32
        for _ in range(values):
            label = self.string()
            (kind,) = self.take("I")
            if label == ALIGNMENT.encode() and kind == 4:
                (alignment,) = self.take("I")
            else:
                self.skip(kind)
        if alignment < 1 or alignment & (alignment - 1):
            raise _broken(self.path, f"{ALIGNMENT}={alignment}", "a power of two")
        ends = [self.tensor() for _ in range(tensors)]
        begin = -(-self.place // alignment) * alignment
        for name, end in ends:
            if begin + end > self.size:
                raise _broken(self.path, f"{name} ends at byte {begin + end:,} of {self.size:,}")

    def take(self, layout: str) -> tuple[int, ...]:
        found: tuple[int, ...] = struct.unpack_from(f"<{layout}", self.content, self.place)
        self.place += struct.calcsize(f"<{layout}")
        return found

    def string(self) -> bytes:
        (length,) = self.take("Q")
        self.move(length)
        return self.content[self.place - length : self.place]

    def move(self, length: int) -> None:
        if length > self.size - self.place:
            raise _broken(self.path, f"{length:,} bytes from byte {self.place:,} on, and it has {self.size:,}")
        self.place += length

    def skip(self, kind: int) -> None:
        """One value."""
        if kind == STRING:
            self.move(self.take("Q")[0])
        elif kind == ARRAY:
            inner, count = self.take("IQ")
            if inner == STRING:
                if count * 8 > self.size:
                    raise _broken(self.path, f"it promises {count:,} strings in {self.size:,} bytes")
                for _ in range(count):
                    self.move(self.take("Q")[0])
            elif inner in WIDTHS:
                self.move(count * WIDTHS[inner])
            else:
                raise _broken(self.path, f"an array of type {inner}", "arrays hold numbers or strings")
        elif kind in WIDTHS:
            self.move(WIDTHS[kind])
        else:
            raise _broken(self.path, f"a value of type {kind}", "types are 0 .. 12")

    def tensor(self) -> tuple[str, int]:
        """Name and last byte, counted from where tensors begin."""
        name = self.string().decode()
        (dimensions,) = self.take("I")
        if dimensions > 4:
            raise _broken(self.path, f"{name} has {dimensions} dimensions", "up to 4")
        numbers = 1
        for length in self.take(f"{dimensions}Q"):
            numbers *= length
        kind, offset = self.take("IQ")
        if kind not in KINDS:
            raise _broken(self.path, f"{name} is of type {kind}", "types of numbers that llama.cpp knows")
        block, width = GGML_QUANT_SIZES[KINDS[kind]]
        return name, offset + numbers // block * width


KINDS = {int(kind): kind for kind in GGMLQuantizationType}


def _broken(
    path: Path, what: str, rule: str = "counts, lengths and offsets of a GGUF file lie within it"
) -> ModelError:
    return ModelError(what, where=str(path), rule=rule, fix="download the file again, whole")
