"""Loaders whose order is a function of (seed, epoch) and which start again where a run was cut off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qtrain.data.collate import Batch
from qtrain.data.numbered_rows import NumberedRows
from qtrain.data.progress import Progress
from qtrain.errors import CheckpointError


class ResumableLoader(ABC):
    """An iterable of batches with ``state_dict`` / ``load_state_dict``, as Lightning looks for them.

    It is no ``DataLoader``, so that Lightning injects no sampler of its own: the rank's share is taken here.

    Args:
        identity: what must be the same for a position to mean the same, by name.
        size: rows of a batch of all ranks together. It may change: batch k holds rows k * size to (k + 1) * size of the
            epoch's order, however many ranks share them.
        progress: who knows what has been trained on. A loader can only count what was fetched, and Lightning fetches
            one batch ahead where there is no length. Without it the loader counts for itself.
    """

    def __init__(self, identity: dict[str, int], size: int, progress: Progress | None = None) -> None:
        self._identity, self._size, self._progress = identity, size, progress
        self._start = self._position = (0, 0)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch is asked for, when Lightning knows its epoch.
        epoch, first = self._progress() if self._progress else self._start
        self._start = self._position = (epoch, first)
        for number, batch in enumerate(self._batches(epoch, first), start=first + 1):
            self._start, self._position = (epoch, 0), (epoch, number)
            yield batch
        self._start = self._position = (epoch + 1, 0)

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Batches of that epoch from number ``first`` on."""

    def state_dict(self) -> dict[str, Any]:
        """The position and the identity of the data: plain numbers."""
        epoch, batch = self._progress() if self._progress else self._position
        return {"epoch": epoch, "batch": batch, "size": self._size, "identity": dict(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration at that position.

        Errors: CheckpointError if data or seed are not those of the checkpoint, or if it lies within a batch of now.
        """
        saved = state["identity"]
        changed = [key for key in self._identity if saved.get(key) != self._identity[key]]
        if changed:
            facts = ", ".join(f"{key} was {saved.get(key)}, is {self._identity[key]}" for key in changed)
            raise CheckpointError(
                f"the data is not what the checkpoint was trained on: {facts}",
                rule="a position in the data means the same only over the same rows and seed",
                fix="resume with the data.* keys and run.seed of the first run",
            )
        self._start = self._position = (state["epoch"], self._recounted(state["batch"], state["size"]))
        if self._progress is not None:
            self._progress.recount(self._recounted(self._progress()[1], state["size"]))

    def _recounted(self, batches: int, size: int) -> int:
        """So many batches of ``size`` rows, in batches of now; those of a whole epoch are a whole epoch."""
        rows = batches * size
        if self._epoch_rows is not None and rows >= self._epoch_rows:
            return -(-self._epoch_rows // self._size)
        if rows % self._size:
            raise CheckpointError(
                f"the checkpoint lies {rows} rows into the epoch, within a batch of {self._size}",
                rule="data.batch_size times the processes must divide the rows that were trained on",
                fix=f"data.batch_size and trainer.devices whose product divides {rows}, as {size} does",
            )
        return rows // self._size

    @property
    def _epoch_rows(self) -> int | None:
        """Rows of an epoch, where that is known."""
        return None


class RowLoader(ResumableLoader):
    """Batches of rows that are held in memory.

    With several ranks each takes every ``world_size``-th row; where the rows do not divide, the first ones fill up
    without labels, so that all ranks see equally many batches and no token counts twice.

    """

    def __init__(
        self,
        rows: NumberedRows,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        identity = {
            "seed": seed,
            "shuffle": int(shuffle),
            "rows": len(rows),
            "checksum": rows.store.checksum(),
        }
        super().__init__(identity, batch_size * world_size, progress)
        self.rows = rows
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._workers, self._rank, self._world_size = workers, rank, world_size

    def __len__(self) -> int:
        share = -(-len(self.rows) // self._world_size)
        return -(-share // self._batch_size)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        batches = _EpochBatches(self.rows, self._order(epoch), self._batch_size)
        yield from DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, len(batches)),
            num_workers=self._workers,
            # Without a generator of its own a DataLoader draws a seed from the global one, and dropout would notice.
            generator=torch.Generator().manual_seed(self._seed),
        )

    @property
    def _epoch_rows(self) -> int:
        return len(self.rows)

    def _order(self, epoch: int) -> list[tuple[int, bool]]:
        """Row numbers of this rank in this epoch, and whether they count; those that fill up do not."""
        count = len(self.rows)
        order = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else np.arange(count)
        filled = -(-count // self._world_size) * self._world_size
        marked = [(int(order[place % count]), place < count) for place in range(filled)]
        return marked[self._rank :: self._world_size]


class _EpochBatches(Dataset[Batch]):
    """The batches of one rank in one epoch, by number."""

    def __init__(self, rows: NumberedRows, order: list[tuple[int, bool]], size: int) -> None:
        self._rows, self._order, self._size = rows, order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __getitem__(self, number: int) -> Batch:
        chosen = self._order[number * self._size : (number + 1) * self._size]
        return self._rows.batch([row for row, _ in chosen], [counts for _, counts in chosen])
