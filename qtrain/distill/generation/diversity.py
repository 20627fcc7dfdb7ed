"""Do generated texts repeat themselves? Figures over rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SAMPLE = 10_000_000
"""Tokens that distinct-n is taken over: it falls with the size of a text, so that only equal sizes compare."""
GRAM = 8
COVERED = 0.25


@dataclass(frozen=True)
class Diversity:
    """Figures of a set of texts.

    Attributes:
        distinct_1, distinct_2, distinct_3: different n-grams over n-grams, of the first 10 million tokens (Li 2016).
        repetitive: share of rows of which one 8-gram covers more than a quarter.
        vocabulary_used: share of the tokenizer's ids that occur.
        duplicates: rows that are equal to an earlier one.
        ended: share of rows that hold a token which ends a text.
    """

    rows: int
    tokens: int
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetitive: float
    vocabulary_used: float
    duplicates: int
    ended: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def diversity(shards: Iterable[NDArray[np.integer]], *, vocabulary: int, ends: Iterable[int]) -> Diversity:
    """Figures of rows [N, L] that come in shards of one length.

    Args:
        vocabulary: number of ids there are; 2**21 at most, for three of them share 64 bits.
        ends: ids that end a text.
    """
    used = np.zeros(vocabulary, dtype=bool)
    grams: tuple[list[NDArray[np.uint64]], ...] = ([], [], [])
    known: set[bytes] = set()
    wanted = np.fromiter(ends, dtype=np.int64)
    rows = tokens = repetitive = ended = 0
    for shard in shards:
        used |= np.bincount(shard.ravel(), minlength=vocabulary) > 0
        repetitive += int(repeating(shard).sum())
        ended += int(np.isin(shard, wanted).any(axis=1).sum())
        known.update(blake2b(row.tobytes(), digest_size=16).digest() for row in shard)
        sample = shard[: -(-max(0, SAMPLE - tokens) // shard.shape[1])]
        for size, parts in enumerate(grams, start=1):
            parts.append(_grams(sample, size))
        rows, tokens = rows + len(shard), tokens + shard.size
    distinct = [_distinct(parts) for parts in grams]
    return Diversity(
        rows=rows,
        tokens=tokens,
        distinct_1=distinct[0],
        distinct_2=distinct[1],
        distinct_3=distinct[2],
        repetitive=repetitive / rows,
        vocabulary_used=float(used.mean()),
        duplicates=rows - len(known),
        ended=ended / rows,
    )


def repeating(rows: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[N]: whether the most frequent 8-gram of a row covers more than a quarter of the row's tokens."""
    count, length = rows.shape
    if length < GRAM:
        return np.zeros(count, dtype=bool)
    hashes = _hashes(rows)
    ordered = np.sort(hashes, axis=1)
    places = ordered.shape[1]
    # For each place of the sorted hashes, how long the run of equal ones is that ends there.
    breaks = np.ones_like(ordered, dtype=bool)
    breaks[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begins = np.maximum.accumulate(np.where(breaks, np.arange(places), 0), axis=1)
    longest = (np.arange(places) - begins).argmax(axis=1)
    frequent = hashes == ordered[np.arange(count), longest][:, None]
    covered = np.zeros((count, length), dtype=bool)
    for offset in range(GRAM):
        covered[:, offset : offset + places] |= frequent
    repetitive: NDArray[np.bool_] = covered.mean(axis=1) > COVERED
    return repetitive


def _hashes(rows: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A number for each 8-gram, [N, L - 7]: a polynomial modulo 2**64, whose odd factor keeps all bits of each id."""
    found = np.zeros((rows.shape[0], rows.shape[1] - GRAM + 1), dtype=np.uint64)
    for offset in range(GRAM):
        found = found * np.uint64(0x9E3779B97F4A7C15) + rows[:, offset : offset + found.shape[1]].astype(np.uint64)
    return found


def _grams(rows: NDArray[np.integer], size: int) -> NDArray[np.uint64]:
    """All n-grams within rows, each as one number."""
    width = max(0, rows.shape[1] - size + 1)
    found = np.zeros((rows.shape[0], width), dtype=np.uint64)
    for offset in range(size):
        found = (found << np.uint64(21)) | rows[:, offset : offset + width].astype(np.uint64)
    return found.ravel()


def _distinct(parts: list[NDArray[np.uint64]]) -> float:
    grams = np.concatenate(parts)
    if not len(grams):
        return 0.0
    grams.sort()  # np.unique hashes (NumPy 2.3 on), which takes 14 times as long here
    return (1 + int((grams[1:] != grams[:-1]).sum())) / len(grams)
