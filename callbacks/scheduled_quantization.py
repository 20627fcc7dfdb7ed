"""The schedule of a module that was quantized before the trainer saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qtrain.console import say
from qtrain.errors import ConfigError
from qtrain.modules.quantizers import quantizers
from qtrain.modules.schedule import QuantizationSchedule, Stage


class ScheduledQuantization(Callback):
    """Delayed start, fewer bits from step to step, frozen ranges: quantizers follow ``trainer.global_step``.

    For modules whose layers are quantized already; ``QuantizationAwareTraining`` prepares them and has a schedule of
    its own. Every transition is printed, and logged as ``quantization/on``, ``/weight_bits`` and ``/ranges_frozen``.

    Args:
        schedule: what holds at which step.
        from_step: of the checkpoint that the fit goes on from: its ranges have the widths of that step.
        find_ranges: chooses ranges anew when quantization sets in late, for training has moved the weights.

    Raises:
        ConfigError: training would end before the schedule does.
    """

    def __init__(
        self,
        schedule: QuantizationSchedule,
        *,
        from_step: int = 0,
        find_ranges: Callable[[Trainer, LightningModule], None] | None = None,
    ) -> None:
        self.schedule, self.from_step, self.find_ranges = schedule, from_step, find_ranges
        self._own: dict[str, str] = {}
        self._stage = Stage()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the stage of the checkpoint; here, before its weights are loaded."""
        if stage != "fit":
            return
        self._own = self._own or {name: quantizer.spec.format for name, quantizer in quantizers(pl_module)}
        self._stage = self.schedule.stage(self.from_step)
        self.schedule.apply(pl_module, self._stage, self._own)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look ahead.

        Raises:
            ConfigError: training would end before the schedule does.
        """
        steps, last = trainer.estimated_stepping_batches, max(self.schedule.start_step, *self.schedule.bits, 0)
        if steps <= last:
            raise ConfigError(
                f"training ends after {steps:.0f} steps, and what will be deployed is quantized from step {last} on",
                rule="method.start_step and the last entry of method.bits_schedule lie before the end",
                fix="a larger trainer.max_steps, or earlier steps",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the fit begins."""
        self._log(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Frozen ranges get no gradient: optimizers leave such parameters alone, decay and momentum included."""
        if self._stage.frozen:
            for _, quantizer in quantizers(pl_module):
                for parameter in quantizer.parameters(recurse=False):
                    parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Be where the trainer is: checkpoints and validations after this step see its stage."""
        self._advance(trainer, pl_module, self.schedule.stage(trainer.global_step))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is measured and saved now is what will be deployed, though training may have been cut short."""
        last = self.schedule.stage(max(trainer.global_step, self.schedule.start_step, *self.schedule.bits, 0))
        if last != self._stage and trainer.is_global_zero:
            say("warning: training ended before its schedule; what follows was not trained")
        self._advance(trainer, pl_module, last)

    def _advance(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        before, self._stage = self._stage, stage
        if stage == before:
            return
        self.schedule.apply(pl_module, stage, self._own)
        if stage.on and not before.on and self.find_ranges is not None:
            self.find_ranges(trainer, pl_module)
        if trainer.is_global_zero:
            say(f"step {trainer.global_step}: {', '.join(stage.changes(before))}")
        self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self._stage.figures(), step=trainer.global_step)
