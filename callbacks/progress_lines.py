"""Progress where no terminal shows a bar: a line now and then, with the time left."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class ProgressLines(Callback):
    """Prints ``step 40/120  loss 1.234  0:35 elapsed, 1:10 left`` every ``seconds`` seconds, on rank 0.

    Args:
        seconds: between two lines.
        stream: where to; default stderr.
    """

    def __init__(self, seconds: float = 10.0, stream: TextIO | None = None) -> None:
        self.seconds, self.stream = seconds, stream
        self._begin = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if it is time."""
        now = time.monotonic()
        done = trainer.global_step - self._first_step
        if now - self._last < self.seconds or not done or not trainer.is_global_zero:
            return
        self._last = now
        total = trainer.estimated_stepping_batches
        loss = trainer.callback_metrics.get("train/loss")
        shown = f"  loss {float(loss):.3f}" if loss is not None else ""
        elapsed = now - self._begin
        left = f", {_clock(elapsed / done * (total - trainer.global_step))} left" if total != float("inf") else ""
        line = f"step {trainer.global_step}/{total}{shown}  {_clock(elapsed)} elapsed{left}"
        print(line, file=self.stream or sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
