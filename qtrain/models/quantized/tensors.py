"""The tensors of a directory by name, read one at a time and checked before they are believed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtrain.errors import ModelError

DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
AHEAD = 2**27
"""Bytes behind a tensor that are read with it: those of its neighbours, in the same layer as a rule."""
FIX = "download the directory again, or correct quantization_config in config.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class TensorFiles:
    """All safetensors of a directory: ``model.safetensors``, the shards of its index, or whatever there is.

    Files stay open (mapped, not read); a tensor is in memory from ``get`` on.

    Raises:
        ModelError: files that are damaged or absent, an index that promises what no file holds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._places: dict[str, tuple[int, int]] = {}
        index = directory / "model.safetensors.index.json"
        promised: dict[str, str] = {}
        if (directory / "model.safetensors").is_file():
            paths = [directory / "model.safetensors"]
        elif index.is_file():
            promised = weight_map(index)
            paths = [directory / name for name in sorted(set(promised.values()))]
        else:
            paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ModelError(
                "no *.safetensors",
                where=str(directory),
                rule="weights are read from safetensors alone: pickle runs code",
                fix="the directory that holds the weights, or download it again",
            )
        for path in paths:
            self._open(path)
        absent = sorted(set(promised) - set(self._files))
        if absent:
            raise ModelError(
                f"{absent[0]} is not in {promised[absent[0]]}",
                where=str(index),
                rule="every tensor of the index is in the file it names",
                fix="download the directory again",
            )

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            names = file.keys()
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"it cannot be read: {error}",
                where=str(path),
                rule="safetensors: a header that describes the bytes after it, all of them",
                fix="download the file again, whole",
            ) from None
        places = _places(path)
        for name in names:
            self._files[name], self._paths[name], self._places[name] = file, path, places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> list[int]:
        """The shape, from the file's header alone."""
        shape: list[int] = self._slice(name).get_shape()
        return shape

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype, from the file's header alone; None for one that no quantized checkpoint uses."""
        stored = self._slice(name).get_dtype()
        return next((dtype for dtype, its in DTYPE_NAMES.items() if its == stored), None)

    def check(self, name: str, shape: list[int], dtypes: Collection[torch.dtype], weight: str) -> None:
        """Whether a tensor is there and looks as its format has it.

        Args:
            weight: what the shape follows from, in words.

        Raises:
            ModelError: it is not, with what was expected.
        """
        found = self.shape(name)
        if found != shape:
            raise ModelError(f"{name} of shape {found}", where=self.where(name), rule=f"{weight} has {shape}", fix=FIX)
        if self.dtype(name) not in dtypes:
            raise ModelError(
                f"{name} in {self._slice(name).get_dtype()}",
                where=self.where(name),
                rule="stored as " + " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes),
                fix=FIX,
            )

    def metadata(self) -> dict[str, str]:
        """What the headers of all files say beside their tensors."""
        found: dict[str, str] = {}
        for file in {id(file): file for file in self._files.values()}.values():
            found |= file.metadata() or {}
        return found

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU; what was read of the file for it leaves the memory when it does."""
        self._slice(name)
        _read_ahead(self._paths[name], *self._places[name])
        with safe_open(self._paths[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def scale(self, name: str) -> Tensor:
        """A tensor of scales, all finite."""
        scale = self.get(name)
        if not bool(scale.isfinite().all()):
            raise ModelError(f"{name} holds NaN or inf", where=self.where(name), rule="scales are finite", fix=FIX)
        return scale

    def place(self, name: str) -> tuple[str, int]:
        """The file that holds a tensor, and its first byte there."""
        return str(self._paths[name]), self._places[name][0]

    def where(self, name: str) -> str:
        """The file that holds a tensor."""
        return str(self._paths.get(name, self.directory))

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ModelError(
                f"{name} is missing",
                where=str(self.directory),
                rule="a quantized layer has all tensors of its format",
                fix="download the directory again",
            )
        return self._files[name].get_slice(name)


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of each tensor in a file that ``safe_open`` took."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    offsets = {name: its["data_offsets"] for name, its in header.items() if name != "__metadata__"}
    return {name: (8 + size + first, last - first) for name, (first, last) in offsets.items()}


def _read_ahead(path: Path, first: int, length: int) -> None:
    """Let the system read all of it, and some more, at once: of a mapped file it reads 128 KB at each fault."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, first, length + AHEAD, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def weight_map(index: Path) -> dict[str, str]:
    """The name of each tensor to that of its file, from a model.safetensors.index.json."""
    fix = "download the directory again"
    try:
        found: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = [name for name in found.values() if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        rule = "weight_map: the name of each tensor to that of its file"
        raise ModelError(f"it is no index of shards: {error!r}", where=str(index), rule=rule, fix=fix) from None
    if outside:
        rule = "shards are safetensors that lie beside their index"
        raise ModelError(f"shard {outside[0]!r}", where=str(index), rule=rule, fix=fix)
    return found
