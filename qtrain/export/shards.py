"""Weights into safetensors files of bounded size, one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.files import write_json


class ShardWriter:
    """Collect tensors up to a size, write them as one file, and go on: what is held is never more than one file.

    The files are named ``model-00001-of-0000N.safetensors`` with their index, or ``model.safetensors`` alone.
    A tensor larger than the size gets a file of its own.

    Args:
        directory: an existing one, where the files go.
        max_shard_size: bytes.
        metadata: what else a file's header says, given the names of its tensors.
    """

    def __init__(
        self, directory: Path, max_shard_size: int, metadata: Callable[[Sequence[str]], dict[str, str]] | None = None
    ) -> None:
        self._metadata = metadata or (lambda names: {})
        self._directory = directory
        self._limit = max_shard_size
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it must not change until it is written.

        Raises:
            ExportError: NaN or inf in it.
        """
        # torch has no test of fp8 numbers.
        wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if wide.is_floating_point() and not bool(wide.isfinite().all()):
            raise ExportError(f"NaN or inf as {tensor.dtype}", where=name, rule="exported weights are finite")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += size
        self.total_bytes += size

    def add_together(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that have to lie in one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        limit, self._limit = self._limit, max(self._limit, size)
        for name, tensor in tensors.items():
            self.add(name, tensor)
        self._limit = limit

    def finish(self) -> None:
        """Write what is held, give the files their names, and write the index."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._unnamed(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
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
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
