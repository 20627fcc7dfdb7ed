"""What would make a step fit: each change is estimated before it is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtrain.config.schema import Config, OptimizerSection
from qtrain.training.plan.estimate import Estimator
from qtrain.training.recompute import LEVELS

SHORTEST = 64
"""Tokens in a row below which nobody wants to go."""


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on, the model left as it is.

    Attributes:
        rows, length: of a micro-batch.
        accumulate: micro-batches in a step.
        level: of recomputation.
        optimizer: its name.
    """

    rows: int
    length: int
    accumulate: int
    level: str
    optimizer: str


@dataclass(frozen=True)
class Change:
    """Words of the command line, and the bytes that a step takes with them."""

    words: str
    total: int


class Changes:
    """Looks for the mildest change of each sort.

    Args:
        config: resolved.
        estimator: of its model.
        batch: its largest micro-batch.
        setting: what it says now.
        room: bytes that a step may take.
    """

    def __init__(
        self, config: Config, estimator: Estimator, batch: Mapping[str, Tensor], setting: Setting, room: int
    ) -> None:
        self._section: OptimizerSection = config.optimizer
        self._estimator, self._batch, self._now, self._room = estimator, batch, setting, room

    def find(self) -> list[Change]:
        """Single changes that fit, the mildest of each sort; where none does, the fewest of them together; or none."""
        sorts = [self._fewer_rows, self._recompute, self._small_optimizer, self._shorter_rows]
        fitting = []
        for sort in sorts:
            found = next((s for s in sort(self._now) if self._total(s) <= self._room), None)
            if found is not None:
                fitting.append(Change(self._words(found), self._total(found)))
        return fitting or self._together()

    def _together(self) -> list[Change]:
        at = self._now
        for sort in (self._fewer_rows, self._recompute, self._small_optimizer, self._shorter_rows):
            for further in sort(at):
                at = further  # to the last of each sort, unless one fits on the way
                if (total := self._total(at)) <= self._room:
                    return [Change(self._words(at), total)]
        return []

    def _fewer_rows(self, at: Setting) -> Iterator[Setting]:
        for rows in range(at.rows - 1, 0, -1):
            if at.rows % rows == 0:
                yield replace(at, rows=rows, accumulate=at.accumulate * (at.rows // rows))

    def _recompute(self, at: Setting) -> Iterator[Setting]:
        for level in LEVELS[LEVELS.index(at.level) + 1 :]:
            yield replace(at, level=level)

    def _small_optimizer(self, at: Setting) -> Iterator[Setting]:
        if at.optimizer == "adamw":
            yield replace(at, optimizer="adamw_8bit")

    def _shorter_rows(self, at: Setting) -> Iterator[Setting]:
        length = at.length
        while (length := length // 2) >= SHORTEST:
            yield replace(at, length=length)

    def _total(self, at: Setting) -> int:
        batch = {key: _cut(tensor, at) for key, tensor in self._batch.items()}
        optimizer = self._section.model_copy(update={"name": at.optimizer})
        return self._estimator.step(batch, optimizer, accumulates=at.accumulate > 1).at(at.level).total

    def _words(self, at: Setting) -> str:
        now, words = self._now, []
        if at.rows != now.rows:
            words += [f"data.batch_size={at.rows}", f"trainer.accumulate_grad_batches={at.accumulate}"]
        if at.level != now.level:
            words.append(f"run.recompute={at.level}")
        if at.optimizer != now.optimizer:
            words.append(f"optimizer.name={at.optimizer}")
        if at.length != now.length:
            words.append(f"data.max_length={at.length}")
        return " ".join(words)


def _cut(tensor: Tensor, at: Setting) -> Tensor:
    return tensor[: at.rows, : at.length] if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 else tensor
