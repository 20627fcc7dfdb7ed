"""A teacher's top-k log-probabilities, read back by row: training then holds one model.

A directory of safetensors shards and ``manifest.json``. A shard has, for its rows' tokens one after the other, ``ids``
[tokens, k] (uint16, or int32 for a vocabulary that needs it), ``log_probs`` [tokens, k] fp16, likeliest first, and
``ends`` [rows], the token at which each row ends. Position t holds the distribution of token t + 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtrain.errors import DataError

MANIFEST = "manifest.json"
AGAIN = "remove the directory, and the cache is written anew; or name another one: distill.cache_dir=DIR"


@dataclass(frozen=True)
class CacheKey:
    """What cached logits depend on: they are of use to a run that has the same.

    Attributes:
        fingerprint: of the teacher's files.
        checksum: of the training rows in their order: what they are packed of as well as the text.
        top_k: log-probabilities kept at each position.
        temperature: T of softmax(logits / T).
    """

    fingerprint: str
    checksum: int | str
    top_k: int
    temperature: float = 1.0

    def check(self, found: dict[str, Any], where: Path) -> None:
        """Refuse a cache of another key.

        Raises:
            DataError: which part differs.
        """
        words = {
            "fingerprint": "another teacher",
            "checksum": "other training rows",
            "top_k": "another distill.top_k",
            "temperature": "another distill.temperature",
        }
        for name, wanted in asdict(self).items():
            if found.get(name) != wanted:
                raise DataError(
                    f"cached logits of {words[name]}: {name} is {found.get(name)!r} there, {wanted!r} here",
                    where=str(where),
                    rule="teacher, rows, distill.top_k and distill.temperature are those the cache was written with",
                    fix=AGAIN,
                )


@dataclass(frozen=True)
class Shard:
    """One file: rows ``first_row`` up to ``first_row + rows``."""

    file: str
    first_row: int
    rows: int
    sha256: str


class CachedLogits:
    """Memory-mapped top-k log-probabilities of each row; a shard's hash is checked when it is first read from.

    Args:
        directory: as ``write_cache`` left it.
        key: what the cache must have been written with.

    Raises:
        DataError: no complete cache, or one of another key.
    """

    def __init__(self, directory: Path, key: CacheKey) -> None:
        manifest = read_record(directory / MANIFEST)
        if manifest is None:
            raise DataError(
                "no complete cache of teacher logits: there is no manifest.json",
                where=str(directory),
                fix="write it (a writer that was stopped goes on where it was), or distill.teacher_logits=online",
            )
        key.check(manifest, directory)
        self.directory = directory
        self.vocab = int(manifest["vocab"])
        self.top_k = min(key.top_k, self.vocab)
        self._shards = [Shard(**shard) for shard in manifest["shards"]]
        self._shard_of = [number for number, shard in enumerate(self._shards) for _ in range(shard.rows)]
        self._opened: dict[int, tuple[Any, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._shard_of)

    def __str__(self) -> str:
        size = sum((self.directory / shard.file).stat().st_size for shard in self._shards)
        logits = f"{self.top_k} of {self.vocab} logits for each token of {len(self)} rows"
        return f"{logits}, {size / 2**20:.1f} MiB in {self.directory}"

    def rows(self, indices: Sequence[int], *, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids [B, L, k] int32 and log-probabilities [B, L, k] fp16 of the rows, likeliest first.

        Args:
            length: L; default: the longest row. Positions after a row's end hold zeros.

        Raises:
            DataError: a row that the cache does not have, one longer than ``length``, a damaged shard.
        """
        found = [self._row(index) for index in indices]
        longest = max(len(ids) for ids, _ in found)
        length = longest if length is None else length
        if longest > length:
            raise DataError(
                f"a cached row has {longest} tokens, the batch {length}", where=str(self.directory), fix=AGAIN
            )
        ids = torch.zeros(len(found), length, self.top_k, dtype=torch.int32)
        log_probs = torch.zeros(len(found), length, self.top_k, dtype=torch.float16)
        for number, (row_ids, row_log_probs) in enumerate(found):
            ids[number, : len(row_ids)] = row_ids
            log_probs[number, : len(row_ids)] = row_log_probs
        return ids, log_probs

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise DataError(f"row {index} of {len(self)} cached rows", where=str(self.directory), fix=AGAIN)
        number = self._shard_of[index]
        content, ends = self._open(number)
        place = index - self._shards[number].first_row
        tokens = slice(ends[place - 1] if place else 0, ends[place])
        return content.get_slice("ids")[tokens].to(torch.int32), content.get_slice("log_probs")[tokens]

    def _open(self, number: int) -> tuple[Any, list[int]]:
        if number not in self._opened:
            shard = self._shards[number]
            path = self.directory / shard.file
            if not path.is_file() or file_hash(path) != shard.sha256:
                raise DataError(
                    f"{shard.file} is {'damaged' if path.is_file() else 'missing'}",
                    where=str(self.directory),
                    rule=f"its SHA-256 is {shard.sha256}, by {MANIFEST}",
                    fix=f"remove {shard.file} and write the cache again: only that file is computed anew",
                )
            content: Any = safe_open(path, framework="pt")
            self._opened[number] = content, content.get_slice("ends")[:].tolist()
        return self._opened[number]


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a manifest, None where there is no such file.

    Raises:
        DataError: it is no manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"no JSON: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise DataError("no manifest of cached logits", where=str(path), fix=AGAIN)
    return content


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
