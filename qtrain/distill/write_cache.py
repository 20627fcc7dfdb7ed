"""A teacher's top-k log-probabilities over the training rows, written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from qtrain.distill.cached import AGAIN, MANIFEST, CachedLogits, CacheKey, Shard, file_hash, read_record
from qtrain.distill.chunked_loss import chunks
from qtrain.errors import DataError
from qtrain.files import atomic_file, write_json
from qtrain.kernels.divergence import log_softmax

Row = TypeVar("Row")
Progress = Callable[[Iterator[Any], int], Iterator[Any]]

UNFINISHED = "unfinished.json"
"""The shards that are complete so far; ``manifest.json`` takes its place at the end."""


def write_cache(
    directory: Path,
    rows: Sequence[Row],
    logits: Callable[[list[Row]], Iterable[Tensor]],
    key: CacheKey,
    *,
    batch_size: int = 8,
    rows_per_shard: int = 256,
    progress: Progress | None = None,
) -> CachedLogits:
    """Write what is missing of the cache and open it.

    A shard is a file of its own that appears when it is complete. After a stop, shards whose hash is the recorded one
    are kept and the others computed; a finished cache is opened as it is.

    Args:
        rows: whatever ``logits`` takes: token ids, or numbers of rows.
        logits: gives the logits [L, vocab] of each of some rows, in order, on any device.
        key: what the logits depend on.
        batch_size: rows given to ``logits`` at a time.
        progress: wraps the loop over shards.

    Raises:
        DataError: no rows; a cache of another key or another number of rows is there; NaN in the logits.
    """
    if len(rows) == 0:
        raise DataError("no rows to cache a teacher's logits of", where=str(directory))
    unfinished = read_record(directory / UNFINISHED)
    record = unfinished or read_record(directory / MANIFEST)
    known = {} if record is None else _recorded(record, directory, key, len(rows))
    if record and not unfinished and all((directory / shard.file).is_file() for shard in known.values()):
        return CachedLogits(directory, key)
    vocab = record["vocab"] if record else None
    firsts = range(0, len(rows), rows_per_shard)
    for first in progress(iter(firsts), len(firsts)) if progress else firsts:
        numbers = range(first, min(first + rows_per_shard, len(rows)))
        if first in known and known[first].rows == len(numbers) and _complete(directory, known[first]):
            continue
        tensors, vocab = _tensors(rows, numbers, logits, key, batch_size)
        path = directory / f"logits-{first // rows_per_shard:05d}.safetensors"
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)
        known[first] = Shard(path.name, first, len(numbers), file_hash(path))
        write_json(directory / UNFINISHED, _content(key, vocab, len(rows), known.values()))
    shards = [known[first] for first in firsts]
    write_json(directory / MANIFEST, _content(key, vocab, len(rows), shards))
    _tidy(directory, {shard.file for shard in known.values()} - {shard.file for shard in shards})
    return CachedLogits(directory, key)


def _recorded(record: dict[str, Any], directory: Path, key: CacheKey, rows: int) -> dict[int, Shard]:
    """The shards of a record by their first row, if they are of the same teacher and rows."""
    key.check(record, directory)
    if record["rows"] != rows:
        raise DataError(
            f"cached logits of {record['rows']} rows, there are {rows} now", where=str(directory), fix=AGAIN
        )
    return {shard["first_row"]: Shard(**shard) for shard in record["shards"]}


def _complete(directory: Path, shard: Shard) -> bool:
    path = directory / shard.file
    return path.is_file() and file_hash(path) == shard.sha256


def _tensors(
    rows: Sequence[Row],
    numbers: range,
    logits: Callable[[list[Row]], Iterable[Tensor]],
    key: CacheKey,
    batch_size: int,
) -> tuple[dict[str, Tensor], int]:
    """The content of one shard, and the size of the vocabulary."""
    ids, log_probs, ends, vocab = [], [], [0], 0
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        for number, row in zip(batch, logits([rows[number] for number in batch]), strict=True):
            vocab = row.shape[-1]
            for part in chunks(*row.shape):
                values, tokens = log_softmax(row[part], key.temperature).topk(min(key.top_k, vocab))
                if bool(values.isnan().any()):
                    raise DataError(f"NaN in the teacher's logits of row {number}")
                ids.append(tokens.cpu().to(torch.uint16 if vocab <= 2**16 else torch.int32))
                log_probs.append(values.cpu().half())
            ends.append(ends[-1] + len(row))
    return {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs), "ends": torch.tensor(ends[1:])}, vocab


def _content(key: CacheKey, vocab: int | None, rows: int, shards: Iterable[Shard]) -> dict[str, Any]:
    return {**asdict(key), "vocab": vocab, "rows": rows, "shards": [asdict(shard) for shard in shards]}


def _tidy(directory: Path, replaced: set[str]) -> None:
    """Let go of the record, of what a writer that was killed left, and of shards of another size."""
    for path in (directory / UNFINISHED, *directory.glob(".logits-*.tmp"), *(directory / file for file in replaced)):
        path.unlink(missing_ok=True)
