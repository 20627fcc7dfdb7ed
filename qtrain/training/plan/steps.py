"""How many steps a run has, and what each of them sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.data.summary import SplitSummary


@dataclass(frozen=True)
class Steps:
    """Counts of a run.

    Attributes:
        rows: in an optimizer step, over all micro-batches and processes.
        tokens: among them on average, padding left out.
        loss_tokens: of those with a loss.
        an_epoch: optimizer steps in it; None of a stream.
        total: of the run; None where time or a stream's end decides.
    """

    rows: int
    tokens: int
    loss_tokens: int
    an_epoch: int | None
    total: int | None

    @property
    def epochs(self) -> float | None:
        """That the run goes through."""
        return None if self.an_epoch is None or self.total is None else self.total / self.an_epoch


def count_steps(split: SplitSummary, batch_size: int, trainer: Mapping[str, Any], processes: int) -> Steps:
    """Of ``trainer.*`` over a split; Lightning makes a step of what is left of a window at the end of an epoch."""
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    batches = math.ceil(math.ceil(split.rows / processes) / batch_size)
    limit = trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    an_epoch = None if split.streamed else max(1, math.ceil(batches / accumulate))
    most, epochs = int(trainer.get("max_steps", -1)), trainer.get("max_epochs")
    total = most if most >= 0 else None
    if an_epoch is not None and "max_time" not in trainer:
        epochs = epochs if epochs is not None or most >= 0 else 1
        by_epochs = an_epoch * epochs if epochs is not None and epochs >= 0 else None
        total = min((n for n in (total, by_epochs) if n is not None), default=None)
    rows = batch_size * accumulate * processes
    rows = rows if split.streamed else min(rows, split.rows)
    share = rows / split.rows
    return Steps(rows, round(split.tokens * share), round(split.loss_tokens * share), an_epoch, total)
