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
            raise DataError("the manifest names this shard, and it is not there", where=str(path), fix=again)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise DataError("the shard is not what was written: its SHA-256 is another", where=str(path), fix=again)
        yield np.load(io.BytesIO(content), allow_pickle=False)


def _name(number: int) -> str:
    return f"tokens-{number:05}.npy"
