"""The plan against the first real steps: memory at its highest, then the time of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qtrain.console import say
from qtrain.files import write_json
from qtrain.training.live_bytes import LiveBytes, tensor_bytes
from qtrain.training.metrics_file import MetricsFile
from qtrain.training.module import LanguageModule
from qtrain.training.plan.plan import Plan
from qtrain.training.plan.shapes import held
from qtrain.training.plan.words import size

MEMORY_STEPS, TIMED_STEPS = 2, 5
"""Steps until each kind of memory has been there at once: the optimizer's state comes with the first; then those that
are timed.
"""


class PlanWatch(Callback):
    """Prints and logs what a plan estimated beside what the first steps take, and how long they will go on.

    The peak of a GPU is its allocator's. That of a CPU is the bytes of live tensors: those that are there before the
    first step, and what operations make in it (see :class:`qtrain.training.live_bytes.LiveBytes`).

    Args:
        plan: of this run.
        path: plan.json.

    Attributes:
        measured: bytes at the highest moment; None before it is known.
        seconds_per_step: likewise.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        self.measured: int | None = None
        self.seconds_per_step: float | None = None
        self._meter: LiveBytes | None = None
        self._from_step = self._timed_from = -1
        self._clock = 0.0
        self._widest = 0

    def to_dict(self) -> dict[str, Any]:
        """The plan, and what was found."""
        return self.plan.to_dict() | {"measured_peak": self.measured, "seconds_per_step": self.seconds_per_step}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._from_step = trainer.global_step
        if pl_module.device.type != "cuda" and self.plan.memory is not None:
            self._meter = LiveBytes(tensor_bytes(_there(trainer, pl_module)))
            self._meter.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the shape, and start the clock."""
        if isinstance(batch, Mapping) and self.measured is None:
            self._widest = max(self._widest, batch["input_ids"].numel())
        done = trainer.global_step - self._from_step
        if self._timed_from < 0 and done >= MEMORY_STEPS:
            self._timed_from = trainer.global_step
            _wait(pl_module)
            self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell what has become known."""
        if self.measured is None and trainer.global_step - self._from_step >= MEMORY_STEPS:
            self._measure(trainer, pl_module)
        if self._clock and trainer.global_step - self._timed_from >= TIMED_STEPS:
            _wait(pl_module)
            self.seconds_per_step = (time.perf_counter() - self._clock) / TIMED_STEPS
            self._clock = 0.0
            self._tell_time(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation among the timed steps ends the measurement: it begins anew after it."""
        if self._clock:
            self._clock, self._timed_from = 0.0, -1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run of fewer steps."""
        if self._meter is not None or (self.measured is None and trainer.global_step > self._from_step):
            self._measure(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._stop()

    def _stop(self) -> int | None:
        meter, self._meter = self._meter, None
        if meter is None:
            return None
        meter.__exit__(None, None, None)
        return meter.peak

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        on_gpu = pl_module.device.type == "cuda"
        self.measured = torch.cuda.max_memory_allocated(pl_module.device) if on_gpu else self._stop()
        peak = self.plan.peak
        if peak is None or self.measured is None or not trainer.is_global_zero:
            return
        off = peak.total / self.measured - 1
        shapes = "" if self._widest >= self.plan.rows * self.plan.length else ", of smaller batches than the largest"
        say(f"memory      {size(self.measured)} measured{shapes}; the plan said {size(peak.total)} ({off:+.1%})")
        found = {"plan/estimated_gib": peak.total / 2**30, "plan/measured_gib": self.measured / 2**30}
        self._log(trainer, found)

    def _tell_time(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self.seconds_per_step is None:
            return
        left = trainer.estimated_stepping_batches - trainer.global_step
        eta = f", {clock(left * self.seconds_per_step)} left" if left != float("inf") else ""
        say(f"time        {self.seconds_per_step:.3g} s a step{eta}, validation not counted")
        self._log(trainer, {"plan/seconds_per_step": self.seconds_per_step})

    def _log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        for logger in trainer.loggers:
            # Not into metrics.csv: these are facts of a process, and a resumed run has them at other steps.
            if not isinstance(logger, MetricsFile):
                logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        write_json(self.path, self.to_dict())


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _there(trainer: Trainer, module: LightningModule) -> Iterator[Tensor]:
    """What training holds before its first step: the model, a teacher, the optimizer's state where it goes on."""
    yield from held(module)
    if isinstance(module, LanguageModule) and module.teacher is not None:
        yield from held(module.teacher.model)
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _wait(module: LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
