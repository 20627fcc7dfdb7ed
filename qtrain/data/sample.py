"""Samples: token ids with their labels, one at a time and stored compactly."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Sample:
    """Token ids and labels of one sample, aligned: ``labels[i]`` is ``input_ids[i]`` or IGNORED.

    The first label is always IGNORED, so that the loss, which shifts, never asks a document to predict the next one.
    """

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)

    def without_labels(self) -> Sample:
        """The sample with no token that carries loss."""
        return Sample(self.input_ids, [IGNORED] * len(self))


class SampleStore:
    """Many samples in flat arrays: 5 bytes a token, where two lists of Python integers take about 70."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._ends = array("q", [0])
        for sample in samples:
            self.append(sample)

    def append(self, sample: Sample) -> None:
        """Add one sample at the end."""
        self._ids.extend(sample.input_ids)
        self._trained.extend(label != IGNORED for label in sample.labels)
        self._ends.append(len(self._ids))

    def extend(self, ids: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> None:
        """Add samples that lie one behind the other in ``ids``, all tokens trained but the first of each.

        No list is made of them: a billion ids would take 36 GB as Python integers.

        Args:
            lengths: tokens of each sample, whose sum is the number of ids.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        trained = np.ones(ids.size, dtype=np.uint8)
        trained[ends - lengths] = 0
        self._ends.frombytes((ends + len(self._ids)).tobytes())
        self._ids.frombytes(ids.astype(np.intc).tobytes())
        self._trained += trained.tobytes()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        ids = self._ids[start:end].tolist()
        return Sample(ids, [i if t else IGNORED for i, t in zip(ids, self._trained[start:end], strict=True)])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [int(length) for length in np.diff(np.asarray(self._ends))]

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return len(self._ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens of all samples that carry loss."""
        return self._trained.count(1)

    def checksum(self) -> int:
        """CRC-32 of ids and masks, by which a resumed run knows its data again."""
        return zlib.crc32(self._trained, zlib.crc32(self._ends.tobytes(), zlib.crc32(self._ids.tobytes())))
