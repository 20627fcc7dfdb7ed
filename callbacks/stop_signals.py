"""A signal during training: the step is finished and saved, then training ends."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qtrain.callbacks.checkpoint_files import checkpoints, step_of
from qtrain.callbacks.trainable_checkpoint import TrainableCheckpoint
from qtrain.stopping import Stopped, answering


class StopSignals(Checkpoint):
    """Saves a checkpoint at the end of the step in which SIGINT or SIGTERM came, and raises Stopped.

    A validation that is due or running comes to its end first. A second signal ends the process at once. One process of
    several is enough to be told: they agree after each optimizer step.

    Lightning calls ``Checkpoint`` callbacks after all others, in their order: this one belongs after ``checkpoint``.

    Args:
        checkpoint: what saves.
    """

    def __init__(self, checkpoint: TrainableCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._number = 0
        self._handlers = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which ends in the middle of a window, or with status 1."""
        self._number = 0
        self._handlers.enter_context(answering(self._note))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if it was asked for and no validation comes first."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            number = self._agreed(trainer)
            if number and self.checkpoint.save(trainer):
                raise self._stopped(number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the checkpoint that had to wait for the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            number = self._agreed(trainer)
            if number and self.checkpoint.saved(trainer):
                raise self._stopped(number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before what comes after the last step."""
        if number := self._agreed(trainer):
            raise self._stopped(number)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._handlers.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._handlers.close()

    def _note(self, number: int) -> None:
        self._number = number

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any of the processes has got, 0 for none."""
        if trainer.world_size == 1:
            return self._number
        number = torch.tensor(float(self._number), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _stopped(self, number: int) -> Stopped:
        saved = checkpoints(Path(str(self.checkpoint.dirpath)))
        what = f"step {step_of(saved[-1])} is saved in {saved[-1]}" if saved else "no step is saved yet"
        return Stopped(number, f"{what}; the same command with run.resume=true goes on from there")
