"""The idx format of MNIST: two zero bytes, a type, the number of dimensions, their sizes, the values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtrain.errors import DataError

UNSIGNED_BYTE = 8
"""The one type of value that images and labels have; the format knows five more."""

GZIP = b"\x1f\x8b"
AGAIN = "get the file anew: apt install --reinstall dataset-fashion-mnist, or torchvision's download"


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of a file: images are [N, H, W], labels [N]. Packed with gzip or not: the content tells.

    Raises:
        DataError: no idx file of unsigned bytes and that many dimensions, or one that was cut off or damaged.
    """
    where = str(path)
    content = _content(path)
    head = 4 + 4 * dimensions
    if len(content) < head:
        raise DataError(f"it ends after {len(content)} bytes, within its header", where=where, fix=AGAIN)
    zeros, kind, found = struct.unpack(">HBB", content[:4])
    if (zeros, kind, found) != (0, UNSIGNED_BYTE, dimensions):
        raise DataError(
            f"it begins with {content[:4].hex(' ')}",
            where=where,
            rule=f"idx with unsigned bytes in {dimensions} dimensions begins with 00 00 08 {dimensions:02x}",
            fix=AGAIN,
        )
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    held, promised = len(content) - head, math.prod(shape)
    if held != promised:
        raise DataError(
            f"it holds {held:,} values of {promised:,}",
            where=where,
            rule=f"its header says {' x '.join(map(str, shape))}",
            fix=AGAIN,
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:  # gzip's own error is an OSError
        raise DataError(f"cannot be read: {error}", where=str(path), fix=AGAIN) from None
