"""Token shards on disk: written one by one, read back only if each bit is as it was written."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data.tokens.manifest import Manifest, Shard, has_manifest, read_manifest, write_manifest
from qtrain.errors import DataError
from qtrain.files import atomic_file

RULE = "each shard is what its manifest says, bit by bit"
Ids = NDArray[np.integer[Any]]


class ShardWriter:
    """The shards of one directory, some of which may be there already.

    Args:
        directory: made if need be.
        wanted: the manifest of an empty directory.

    Raises:
        DataError: shards of another model, other options or another seed lie there.
    """

    def __init__(self, directory: Path, wanted: Manifest) -> None:
        self.directory, self.manifest = directory, wanted
        if has_manifest(directory):
            self.manifest = read_manifest(directory)
            differences = self.manifest.origin.differences(wanted.origin)
            if differences:
                raise DataError(
                    "the token shards that lie here are others: " + "; ".join(differences),
                    where=str(directory),
                    rule="a directory holds shards of one model, one seed and one set of options",
                    fix="generate_data.dir=ANOTHER, or delete this directory",
                )

    def pending(self, rows: int) -> list[tuple[int, int]]:
        """(number, rows) of each shard that ``rows`` rows take and that is not there whole and sound."""
        size = self.manifest.origin.shard_rows
        sizes = [min(size, rows - begin) for begin in range(0, rows, size)]
        known = {shard.file: shard for shard in self.manifest.shards}
        return [(number, count) for number, count in enumerate(sizes) if not self._holds(known, number, count)]

    def write(self, number: int, ids: Ids, *, entropy: float | None = None) -> None:
        """Write one shard and then the manifest that names it; ``ids`` [rows, length]."""
        stream = io.BytesIO()
        np.save(stream, ids.astype(self.manifest.dtype), allow_pickle=False)
        content = stream.getvalue()
        shard = Shard(file=_name(number), rows=len(ids), sha256=hashlib.sha256(content).hexdigest(), entropy=entropy)
        with atomic_file(self.directory / shard.file) as path:
            path.write_bytes(content)
        others = [known for known in self.manifest.shards if known.file != shard.file]
        self._update(shards=tuple(sorted([*others, shard], key=lambda known: known.file)), complete=False)

    def finish(self, statistics: dict[str, float]) -> None:
        """Say in the manifest that nothing is missing."""
        self._update(complete=True, statistics=statistics)

    def _holds(self, known: dict[str, Shard], number: int, rows: int) -> bool:
        shard = known.get(_name(number))
        if shard is None or shard.rows < rows:
            return False
        path = self.directory / shard.file
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256

    def _update(self, **changes: Any) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        write_manifest(self.directory, self.manifest)


def read_shards(directory: Path, manifest: Manifest) -> Iterator[Ids]:
    """The ids of each shard, [rows, length].

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    for shard in manifest.shards:
        path = directory / shard.file
        again = (
            f"delete it and call `qtrain generate-data` with generate_data.dir={directory} as before: it is made anew"
        )
        if not path.is_file():
            raise DataError("the manifest names this shard, and it is not there", where=str(path), rule=RULE, fix=again)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise DataError(
                "the shard is not what was written: its SHA-256 is another", where=str(path), rule=RULE, fix=again
            )
        yield _ids(content, shard, manifest, path, again)


def _ids(content: bytes, shard: Shard, manifest: Manifest, path: Path, again: str) -> Ids:
    """The array in a file, its header held against the manifest before anything is allocated; no archive, no pickle."""
    origin, stream = manifest.origin, io.BytesIO(content)
    expected = ((shard.rows, origin.length), False, np.dtype(manifest.dtype))
    try:
        np.lib.format.read_magic(stream)
        found = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # NumPy reads a header as a literal of Python: its tokenizer has errors of its own
        raise DataError(f"it is no NumPy array: {error}", where=str(path), rule=RULE, fix=again) from None
    size = shard.rows * origin.length * expected[2].itemsize
    if found != expected or len(content) - stream.tell() != size:
        raise DataError(
            f"it holds {list(found[0])} {found[2]} in {len(content):,} bytes",
            where=str(path),
            rule=f"its manifest says [{shard.rows}, {origin.length}] {manifest.dtype}",
            fix=again,
        )
    ids: Ids = np.frombuffer(content, expected[2], offset=stream.tell()).reshape(expected[0])
    return ids


def _name(number: int) -> str:
    return f"tokens-{number:05}.npy"
