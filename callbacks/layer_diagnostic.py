"""Figures of every layer, every few steps: what the diagnostics of quantization have in common."""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from qtrain.callbacks.periods import check_period
from qtrain.files import atomic_file

COLUMNS = ["step", "diagnostic", "layer", "value"]
Figures = Mapping[str, Mapping[str, Tensor]]
"""Diagnostic to layer to a scalar on the device."""


class LayerDiagnostic(Callback, ABC):
    """Measures every layer after each ``every_n_steps`` optimizer steps, and after the last of ``max_steps``.

    Loggers get ``quantization/<diagnostic>``, the mean over layers, with the largest and the smallest; W&B a histogram
    as well; every layer's figure goes to ``DIR/diagnostics.csv``, from which the report draws. All layers are waited
    for at once. Of several processes, each figure is their mean.

    Args:
        every_n_steps: between two looks.
        dir: of diagnostics.csv; default ``trainer.default_root_dir``.
    """

    def __init__(self, every_n_steps: int = 50, dir: str | Path | None = None) -> None:
        check_period(self, every_n_steps)
        self.every_n_steps, self.dir = every_n_steps, dir
        self._last_step = 0
        self._file: DiagnosticsFile | None = None

    @abstractmethod
    def measure(self, pl_module: LightningModule) -> Figures:
        """The figures as they are now; diagnostics and layers that have none are left out."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the trainer is."""
        self._last_step, self._file = trainer.global_step, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if a step was taken and it is time."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.is_time(trainer, trainer.global_step):
            self.write(trainer, self.measure(pl_module))

    def is_time(self, trainer: Trainer, step: int) -> bool:
        """Whether that step, counted from 1, is followed by a look."""
        return step % self.every_n_steps == 0 or step == trainer.max_steps

    def write(self, trainer: Trainer, figures: Figures) -> None:
        """Log and write what was measured after this step."""
        flat = [(diagnostic, layer, one) for diagnostic, layers in figures.items() for layer, one in layers.items()]
        if not flat:
            return
        stacked = torch.stack([one.detach().to(torch.float32).reshape(()) for _, _, one in flat])
        if trainer.world_size > 1:  # each process has seen activations of its own rows
            stacked = trainer.strategy.reduce(stacked, reduce_op="mean")
        if not trainer.is_global_zero:
            return
        values = stacked.tolist()
        rows = [(diagnostic, layer, value) for (diagnostic, layer, _), value in zip(flat, values, strict=True)]
        # The loop's own counter, as in Lightning's monitors: the row that holds this step's loss.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for diagnostic in figures:
            finite = [value for name, _, value in rows if name == diagnostic and math.isfinite(value)]
            if finite:
                _log(trainer, f"quantization/{diagnostic}", finite, step)
        if self._file is None:
            self._file = DiagnosticsFile(Path(self.dir or trainer.default_root_dir) / "diagnostics.csv")
        self._file.add(step, rows)


class DiagnosticsFile:
    """``diagnostics.csv``: a row for each step, diagnostic and layer; several callbacks share it.

    Rows of the same diagnostics from the first step written here on are those of a run that was cut off: they go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False

    def add(self, step: int, rows: Iterable[tuple[str, str, float]]) -> None:
        """Append the rows of one step."""
        new = [[str(step), diagnostic, layer, f"{value:.6g}"] for diagnostic, layer, value in rows]
        if self._begun:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(new)
            return
        names = {row[1] for row in new}
        kept = [row for row in read_rows(self.path) if row[1] not in names or int(row[0]) < step]
        with atomic_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept, *new])
        self._begun = True


def read_rows(path: Path) -> list[list[str]]:
    """Rows of such a file without its header; a line that was cut off is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in csv.reader(lines[1:]) if len(row) == len(COLUMNS)]


def _log(trainer: Trainer, key: str, values: list[float], step: int) -> None:
    figures = {key: sum(values) / len(values), f"{key}_max": max(values), f"{key}_min": min(values)}
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=step)
        if isinstance(logger, WandbLogger):
            import wandb  # half a second, and for those alone who log there

            logger.experiment.log({f"{key}_by_layer": wandb.Histogram(values), "trainer/global_step": step})
