"""What follows the head of a .gguf file: tensors, each at a multiple of the alignment."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qtrain.files import write_json

log = logging.getLogger(__name__)
CHUNK = 2**24


class TensorData:
    """A file that begins with ``head`` and grows by tensors; with a journal, it goes on where it was whole.

    Args:
        path: of the file.
        head: header, keys and tensor infos.
        alignment: bytes.
        journal: where it is noted how far the file is right; None: begin anew.
        every: bytes after which it is noted again.

    Attributes:
        finished: a word on each tensor that is there, as ``add`` was given it.
    """

    def __init__(self, path: Path, head: bytes, alignment: int, journal: Path | None, every: int) -> None:
        self._alignment, self._journal, self._every = alignment, journal, every
        self.finished, self._size, self._crc32 = self._whole(path, head)
        self._file = path.open("r+b" if self.finished else "wb")
        if self.finished:
            log.info("going on with an unfinished export: %d tensors are there", len(self.finished))
            self._file.truncate(self._size)
            self._file.seek(self._size)
        else:
            self._write(head)
            self._pad()
        self._noted = self._size

    def add(self, tensor: npt.NDArray[Any], word: bool) -> None:
        """Write one tensor.

        Args:
            word: what is to be known of it by who goes on.
        """
        self._write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self._pad()
        self.finished.append(word)
        if self._journal is not None and self._size - self._noted >= self._every:
            self._file.flush()
            noted = {"finished": self.finished, "size": self._size, "crc32": self._crc32}
            write_json(self._journal, noted)
            self._noted = self._size

    def _whole(self, path: Path, head: bytes) -> tuple[list[bool], int, int]:
        """What was noted of the file, if that is still true of it and it begins with ``head``."""
        if self._journal is None or not self._journal.is_file() or not path.is_file():
            return [], 0, 0
        noted = json.loads(self._journal.read_text(encoding="utf-8"))
        size, crc32 = noted["size"], 0
        with path.open("rb") as file:
            right = file.read(len(head)) == head
            file.seek(0)
            for block in _blocks(file, size):
                crc32 = zlib.crc32(block, crc32)
        right = right and path.stat().st_size >= size and crc32 == noted["crc32"]
        return (noted["finished"], size, crc32) if right else ([], 0, 0)

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._size += len(content)
        if self._journal is not None:
            self._crc32 = zlib.crc32(content, self._crc32)

    def _pad(self) -> None:
        self._write(bytes(-self._size % self._alignment))

    def __enter__(self) -> TensorData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _blocks(file: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(CHUNK, size))):
        size -= len(block)
        yield block
