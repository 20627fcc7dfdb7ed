"""Training data that does not fit in memory: read, encoded and packed block by block.

Each block is shuffled and packed by itself, so what a block gives depends on nothing before it. A position is therefore
small (the record a block begins at, and a row in it), and a run goes on after one block of work, not after the whole
way up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from qtrain.data.collate import Batch, Collate
from qtrain.data.contents import Item, read_contents
from qtrain.data.encoding import Encoder, Tally
from qtrain.data.formats.record import Document
from qtrain.data.loader import ResumableLoader
from qtrain.data.packing import pack
from qtrain.data.progress import Progress
from qtrain.data.sample import Sample
from qtrain.data.sources import Location
from qtrain.errors import DataError, QtrainError

# A row that stays partly empty at the end of each block costs under 1 % at 2,048 tokens a row.
BLOCK_RECORDS = 1024
BLOCK_CHARACTERS = 4 << 20

Cursor = tuple[int, int, int]
"""Source, record in it at which the block begins, row in the block."""


class RowStream:
    """Rows of sources of any size in the order of one epoch, which is shuffled within each block.

    Args:
        split: of hub ids that name none.
    """

    def __init__(self, locations: list[Location], encoder: Encoder, *, split: str, shuffle: bool, seed: int) -> None:
        self._locations, self._encoder, self._split = locations, encoder, split
        self._shuffle, self._seed = shuffle, seed

    @property
    def identity(self) -> dict[str, int]:
        """What decides the rows, apart from the data itself, which is not read whole."""
        section = self._encoder.section
        return {"shuffle": int(self._shuffle), "packing": int(section.packing), "max_length": section.max_length}

    def rows(self, epoch: int, cursor: Cursor = (0, 0, 0)) -> Iterator[tuple[list[Sample], Cursor]]:
        """Rows from ``cursor`` on, each with the cursor of the row after it."""
        source, record, skip = cursor
        for begin, after, samples in self._blocks(source, record):
            rows = self.pack([len(sample) for sample in samples])
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch, *begin]).permutation(len(rows))
                rows = [rows[place] for place in order]
            for number, row in enumerate(rows[skip:], start=skip + 1):
                yield [samples[index] for index in row], (*begin, number) if number < len(rows) else (*after, 0)
            skip = 0

    def first_block(self, tally: Tally) -> list[Sample]:
        """The samples of the first block."""
        return self._encoder.encode([item for _, item in _take(self._items(0, 0))], tally)

    def pack(self, lengths: list[int]) -> list[list[int]]:
        """Rows of a block."""
        if not self._encoder.section.packing:
            return [[index] for index in range(len(lengths))]
        return pack(lengths, self._encoder.section.max_length)

    def _blocks(self, source: int, record: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], list[Sample]]]:
        """Where each block begins, where it ends, and its samples."""
        items = self._items(source, record)
        begin = (source, record)
        while block := _take(items):
            after = (block[-1][0][0], block[-1][0][1] + 1)
            yield begin, after, self._encoder.encode([item for _, item in block], Tally())
            begin = after

    def _items(self, source: int, record: int) -> Iterator[tuple[tuple[int, int], Item]]:
        section = self._encoder.section
        for number in range(source, len(self._locations)):
            start = record if number == source else 0
            items = read_contents(self._locations[number], section, split=self._split, whole=False, start=start)
            for index, item in enumerate(items, start=start):
                yield (number, index), item


class StreamLoader(ResumableLoader):
    """Batches of a stream; it has no length.

    Every rank reads the whole stream and takes every ``world_size``-th row, so that all see equally many batches;
    reading and tokenizing are two orders of magnitude faster than training. With ``workers`` above 0, one process
    reads ahead: the order of a stream belongs to one reader.
    """

    def __init__(
        self,
        stream: RowStream,
        collate: Collate,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        super().__init__({**stream.identity, "seed": seed}, batch_size * world_size, progress)
        self._stream, self._collate, self._batch_size, self._seed = stream, collate, batch_size, seed
        self._workers, self._rank, self._world_size = workers, rank, world_size
        self._cursors: dict[tuple[int, int], Cursor] = {}

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        # Without a known cursor the epoch is run through from its start, which comes to the same batch, only later.
        cursor = self._cursors.get((epoch, first))
        self._cursors = {}
        batches = _StreamBatches(
            self._stream, self._collate, self._batch_size, self._rank, self._world_size, epoch, cursor or (0, 0, 0)
        )
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=min(self._workers, 1),
            generator=torch.Generator().manual_seed(self._seed),
        )
        for number, (batch, after) in enumerate(loader, start=first if cursor else 0):
            if isinstance(batch, QtrainError):
                raise batch
            # Lightning holds one batch it has not trained on, so the cursors of the last two are wanted.
            self._cursors = dict([*self._cursors.items(), ((epoch, number + 1), after)][-3:])
            if number >= first:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and the cursor to get there at once."""
        state = super().state_dict()
        cursor = self._cursors.get((state["epoch"], state["batch"]))
        return {**state, "cursor": list(cursor) if cursor else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As for every loader; the cursor saves reading what was read."""
        super().load_state_dict(state)
        if state["cursor"]:
            source, record, row = state["cursor"]
            self._cursors = {self._start: (source, record, row)}


class _StreamBatches(IterableDataset[tuple[Batch | QtrainError, Cursor]]):
    """The batches of one rank with the cursor after each; an error comes as a value, whole, out of a worker."""

    def __init__(
        self, stream: RowStream, collate: Collate, size: int, rank: int, world_size: int, epoch: int, cursor: Cursor
    ) -> None:
        self._stream, self._collate, self._size, self._rank = stream, collate, size, rank
        self._world_size, self._epoch, self._cursor = world_size, epoch, cursor

    def __iter__(self) -> Iterator[tuple[Batch | QtrainError, Cursor]]:
        try:
            yield from self._batches()
        except QtrainError as error:
            yield error, self._cursor

    def _batches(self) -> Iterator[tuple[Batch, Cursor]]:
        rows = self._stream.rows(self._epoch, self._cursor)
        found = False
        while taken := list(islice(rows, self._size * self._world_size)):
            found, after = True, taken[-1][1]
            share = [row for row, _ in taken[self._rank :: self._world_size]]
            if len(taken) % self._world_size and len(share) < -(-len(taken) // self._world_size):
                share.append([sample.without_labels() for sample in taken[0][0]])
            yield self._collate(share), after
        if not found and self._cursor == (0, 0, 0):
            raise DataError("the stream has no sample that carries loss", fix="look at data.train and data.train_on")


def _take(items: Iterator[tuple[tuple[int, int], Item]]) -> list[tuple[tuple[int, int], Item]]:
    """The next block: so many records, or so much text."""
    block, characters = [], 0
    for place, item in items:
        block.append((place, item))
        content = item.content
        characters += (
            len(content.text) if isinstance(content, Document) else sum(len(turn.content) for turn in content.turns)
        )
        if len(block) >= BLOCK_RECORDS or characters >= BLOCK_CHARACTERS:
            break
    return block
