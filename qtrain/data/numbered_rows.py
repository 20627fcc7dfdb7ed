"""The rows of a split by their numbers, which mean the same whatever the order, the seed and the batch size."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qtrain.data.collate import Batch, Collate, Row
from qtrain.data.sample import SampleStore
from qtrain.modules.token_loss import ROWS


@dataclass(frozen=True)
class NumberedRows:
    """What lies in each row, and how rows become a batch.

    Attributes:
        store: all samples of the split.
        rows: sample indices of each row.
        collate: makes a batch of some rows.
    """

    store: SampleStore
    rows: list[list[int]]
    collate: Collate

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int], counted: Sequence[bool] | None = None) -> Batch:
        """The batch of these rows, with ``rows`` [B], their numbers.

        Args:
            counted: whether each row's labels count; default: all do.
        """
        rows: list[Row] = []
        for place, number in enumerate(numbers):
            samples = [self.store[index] for index in self.rows[number]]
            rows.append(
                samples if counted is None or counted[place] else [sample.without_labels() for sample in samples]
            )
        return {**self.collate(rows), ROWS: torch.tensor(numbers)}

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, without padding."""
        indices, sizes = self._flat()
        lengths = np.asarray(self.store.lengths, dtype=np.int64)[indices]
        return np.add.reduceat(lengths, np.cumsum(sizes) - sizes)

    def checksum(self) -> int:
        """CRC-32 of the samples and of which of them lie in which row."""
        indices, sizes = self._flat()
        return zlib.crc32(sizes.tobytes(), zlib.crc32(indices.tobytes(), self.store.checksum()))

    def _flat(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The sample indices of all rows one after the other, and how many each row has."""
        return np.fromiter(chain.from_iterable(self.rows), np.int64), np.fromiter(map(len, self.rows), np.int64)
