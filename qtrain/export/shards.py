"""Weights into safetensors files of bounded size, one tensor after another."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.files import write_json

log = logging.getLogger(__name__)
CHUNK = 2**24


@dataclass(frozen=True)
class Shard:
    """A finished file.

    Attributes:
        tensors: names to bytes, in the order they came in.
        complete: whose tensors are all in this file and those before it.
        size, crc32: of the file.
    """

    tensors: dict[str, int]
    complete: list[str]
    size: int
    crc32: int


class ShardWriter:
    """Collect tensors up to a size, write them as one file, and go on: what is held is never more than one file.

    The files are named ``model-00001-of-0000N.safetensors`` with their index, or ``model.safetensors`` alone.
    A tensor larger than the size gets a file of its own. Files that an interrupted export finished, and that are still
    what it wrote, are kept: what ``holds`` names need not be computed again, and the result is the same.

    Args:
        directory: an existing one, where the files go.
        max_shard_size: bytes.
        metadata: what else a file's header says, given the names of its tensors.
        journal: where it is noted what is finished, of an export that will be gone on with; ``directory`` is its own.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_size: int,
        metadata: Callable[[Sequence[str]], dict[str, str]] | None = None,
        *,
        journal: Path | None = None,
    ) -> None:
        self._metadata = metadata or (lambda names: {})
        self._directory, self._journal = directory, journal
        self._limit = max_shard_size
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._complete: list[str] = []
        self._shards = self._finished()
        self._known = {name: size for shard in self._shards for name, size in shard.tensors.items()}
        self._done = {owner for shard in self._shards for owner in shard.complete}

    @property
    def total_bytes(self) -> int:
        """Of all tensors so far."""
        return sum(self._known.values())

    def bytes_of(self, others: Sequence[str]) -> int:
        """Of all tensors so far but these."""
        return self.total_bytes - sum(self._known.get(name, 0) for name in others)

    def holds(self, owner: str) -> bool:
        """Whether all that was added for ``owner`` is in finished files."""
        return owner in self._done

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, its own owner; it must not change until it is written.

        Raises:
            ExportError: NaN or inf in it.
        """
        self.add_all(name, {name: tensor})

    def add_all(self, owner: str, tensors: Mapping[str, Tensor], *, together: bool = False) -> None:
        """Take all tensors that stand for one of the model.

        Args:
            together: they have to lie in one file.

        Raises:
            ExportError: NaN or inf in one.
        """
        if together:
            self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        for name, tensor in tensors.items():
            if name in self._known:  # of a layer that lies in two files, the first of them finished
                continue
            _check_finite(name, tensor)
            if not together:
                self._make_room(tensor.nbytes)
            self._held[name] = tensor.detach().cpu().contiguous()
            self._held_bytes += tensor.nbytes
            self._known[name] = tensor.nbytes
        self._complete.append(owner)

    def _make_room(self, size: int) -> None:
        if self._held and self._held_bytes + size > self._limit:
            self._flush()

    def finish(self) -> None:
        """Write what is held, give the files their names, and write the index."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._unnamed(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, shard in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).rename(self._directory / file)
            weight_map.update(dict.fromkeys(shard.tensors, file))
        write_json(
            self._directory / "model.safetensors.index.json",
            {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map},
        )

    def _flush(self) -> None:
        # The number of files is part of their names and is known at the end only.
        path = self._unnamed(len(self._shards))
        # safetensors makes files that only their owner reads; these are to be served by others too.
        path.touch()
        mode = path.stat().st_mode
        save_file(self._held, path, metadata={"format": "pt", **self._metadata(list(self._held))})
        path.chmod(mode)
        _sort_metadata(path)
        sizes = {name: tensor.nbytes for name, tensor in self._held.items()}
        self._held, self._held_bytes = {}, 0
        crc32 = _crc32(path) if self._journal is not None else 0
        self._shards.append(Shard(sizes, self._complete, path.stat().st_size, crc32))
        self._complete = []
        if self._journal is not None:
            write_json(self._journal, {"shards": [asdict(shard) for shard in self._shards]})

    def _finished(self) -> list[Shard]:
        """The files of an interrupted export up to the first that is not, byte by byte, what was written there."""
        noted: list[Shard] = []
        if self._journal is not None and self._journal.is_file():
            content = json.loads(self._journal.read_text(encoding="utf-8"))
            noted = [Shard(**shard) for shard in content["shards"]]
        for number in range(len(noted)):  # it may have been stopped while files got their names
            for named in [*self._directory.glob(f"model-{number + 1:05d}-of-*.safetensors")]:
                named.rename(self._unnamed(number))
        if len(noted) == 1 and (self._directory / "model.safetensors").is_file():
            (self._directory / "model.safetensors").rename(self._unnamed(0))
        whole = 0
        for number, shard in enumerate(noted):
            path = self._unnamed(number)
            if not path.is_file() or path.stat().st_size != shard.size or _crc32(path) != shard.crc32:
                break
            whole += 1
        kept = {self._unnamed(number) for number in range(whole)}
        for path in self._directory.iterdir() if self._journal is not None else ():
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if whole:
            log.info("going on with an unfinished export: %d files of weights are there", whole)
        return noted[:whole]

    def _unnamed(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()


def _check_finite(name: str, tensor: Tensor) -> None:
    # torch has no test of fp8 numbers.
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    # A sum of finite numbers is finite, unless it overflows, and takes a fortieth of the time of looking at each.
    if wide.is_floating_point() and not (bool(wide.sum().isfinite()) or bool(wide.isfinite().all())):
        raise ExportError(f"NaN or inf as {tensor.dtype}", where=name, rule="exported weights are finite")


def _sort_metadata(path: Path) -> None:
    """safetensors (0.8) writes what is not a tensor in an order of chance; an export is the same bytes each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def _crc32(path: Path) -> int:
    """Of a file's bytes: 3.5 GB/s, where SHA-256 makes 1.8; it is to tell torn files, not forged ones."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            found = zlib.crc32(block, found)
    return found
