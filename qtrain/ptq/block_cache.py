"""The blocks that are quantized already, on disk: a run that was stopped goes on with the next one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qtrain.errors import CheckpointError
from qtrain.files import atomic_file, write_json
from qtrain.modules.block_chain import BlockError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import pack, unpack
from qtrain.numerics.spec import QuantSpec

KEY = "key.json"
SAMPLES = 1024
"""Numbers of each tensor that tell one model from another: another fine-tune differs in nearly every weight."""


class BlockCache:
    """A directory with ``key.json``, what its content depends on, and ``block-KKK.safetensors`` of each finished block.

    A block's file has for each of its layers ``NAME.codes`` (packed words), ``NAME.scale`` and, where there is one,
    ``NAME.zero_point``, and in its metadata the block's error before and after.

    Args:
        key: names and values, all text.

    Attributes:
        done: number of blocks that are finished.

    Raises:
        CheckpointError: the directory was written with another key.
    """

    def __init__(self, directory: Path, key: Mapping[str, str]) -> None:
        self.directory = directory
        path = directory / KEY
        if path.is_file():
            _check(json.loads(path.read_text(encoding="utf-8")), key, directory)
        else:
            write_json(path, dict(key))
        self.done = 0
        while self._file(self.done).is_file():
            self.done += 1

    def save(self, k: int, records: Mapping[str, LinearRecord], error: BlockError) -> None:
        """Keep what became of block k."""
        tensors: dict[str, Tensor] = {}
        for name, record in records.items():
            tensors[f"{name}.codes"] = pack(record.codes, record.spec.bits).cpu()
            tensors[f"{name}.scale"] = record.scale.cpu()
            if record.zero_point is not None:
                tensors[f"{name}.zero_point"] = record.zero_point.cpu()
        with atomic_file(self._file(k)) as temporary:
            save_file(tensors, temporary, {"name": error.name, "before": f"{error.before}", "after": f"{error.after}"})
        self.done = k + 1

    def load(
        self, k: int, layers: Mapping[str, nn.Linear], specs: Mapping[str, QuantSpec]
    ) -> tuple[dict[str, LinearRecord], BlockError]:
        """What became of block k; records lie where its layers do.

        Args:
            layers: of the block, that have records, by name.
            specs: of these names.
        """
        records = {}
        with safe_open(self._file(k), framework="pt") as file:
            known, facts = set(file.keys()), file.metadata()
            for name, linear in layers.items():
                spec, device = specs[name], linear.weight.device
                codes = unpack(file.get_tensor(f"{name}.codes"), spec.bits, linear.in_features).to(device)
                zero = f"{name}.zero_point"
                zero_point = file.get_tensor(zero).to(device) if zero in known else None
                records[name] = LinearRecord(codes, file.get_tensor(f"{name}.scale").to(device), zero_point, spec)
        return records, BlockError(facts["name"], float(facts["before"]), float(facts["after"]))

    def _file(self, k: int) -> Path:
        return self.directory / f"block-{k:03d}.safetensors"


def digest(content: object) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def tensor_digest(tensors: Mapping[str, Tensor], samples: int | None = SAMPLES) -> str:
    """A short hash of names, dtypes, shapes and evenly spaced numbers of each tensor; with None of all numbers."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, len(flat) // samples)] if samples else flat
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _check(found: Mapping[str, Any], key: Mapping[str, str], directory: Path) -> None:
    differing = [name for name in key if found.get(name) != key[name]]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"quantized blocks of another run: {', '.join(differing)} differ "
            f"({name} is {found.get(name)!r} there, {key[name]!r} here)",
            where=str(directory),
            rule="a run goes on with the model, the layers, the text and the options that it began with",
            fix="remove the directory, or name another one",
        )
