"""Checkpoints of what trains, never of the frozen base, from which a run goes on bit-exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.callbacks.checkpoint_files import KEY, CheckpointFiles, best_checkpoint, check, checkpoints, damaged, retain
from qtrain.errors import CheckpointError
from qtrain.files import sweep
from qtrain.training.processes import gather
from qtrain.training.random_state import random_state, set_random_state


class TrainableCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that keeps what trains, optimizer, schedule, data position and random states.

    Plain data only: files load with ``weights_only=True``. The last ``keep`` checkpoints stay, and the one of the
    lowest validation loss. Beside each lies its checksum, which is compared when it is loaded. What trains: the
    trained parameters, and persistent buffers (running statistics, calibrated ranges) but those of frozen layers. The
    base is not written; its fingerprint is, and loading over another base is refused.

    Where a validation is due, a step is saved after it: Lightning never makes up for one that a checkpoint of the
    moment before has missed. So the best step is saved whatever the interval.

    Args:
        dirpath: where to.
        every_n_train_steps: optimizer steps between two; 0 is the end of each epoch.
        keep: last checkpoints that stay on disk.
        best_of: the logged metric whose lowest value makes a checkpoint the best one.
        fingerprint: which base this is; default: the module's ``base_fingerprint`` if it has one.
    """

    def __init__(
        self,
        dirpath: str,
        *,
        every_n_train_steps: int = 0,
        keep: int = 2,
        best_of: str = "val/loss",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=-1,  # what stays is decided here, from what lies there: a killed process forgets
            every_n_train_steps=every_n_train_steps or None,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            enable_version_counter=False,
        )
        self.keep, self.best_of, self.fingerprint = keep, best_of, fingerprint
        self._lowest = math.inf
        self._foreign: set[Path] = set()
        self._deferred = False
        self._validated: tuple[int, float] | None = None
        self._row: dict[str, float] | None = None
        self._random_state: dict[str, Any] | None = None
        self._check: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning accept a state without the base; what must be there is checked here."""
        super().setup(trainer, pl_module, stage)
        pl_module.strict_loading = False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if stage == "fit":
            if trainer.is_global_zero:
                sweep(Path(str(self.dirpath)))

            # Lightning loads the weights before it asks callbacks: shapes that differ would end in torch's own words.
            def compare(module: nn.Module, state: Mapping[str, Tensor], *_: Any) -> None:
                _check_fit(module, state, _where(trainer))

            self._check = pl_module.register_load_state_dict_pre_hook(compare)  # type: ignore[no-untyped-call]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are restored by now: what is loaded later is no business of this callback."""
        if self._check is not None:
            self._check.remove()
            self._check = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop what is frozen; add the random states and the base's fingerprint."""
        frozen = pl_module.state_dict().keys() - _what_trains(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        loss = self._validated[1] if self._validated and self._validated[0] == trainer.global_step else None
        checkpoint[KEY] = {
            "fingerprint": self._fingerprint(pl_module),
            "random_states": gather(random_state()),
            "val_loss": loss,
            "row": self._row,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the base; names and shapes are compared when the weights are loaded."""
        own = checkpoint.get(KEY)
        where = _where(trainer)
        if own is None:
            raise CheckpointError(
                "this checkpoint was not written by TrainableCheckpoint: it has no random states and no fingerprint",
                where=where,
                fix="resume from one that was, or load its weights yourself",
            )
        here = self._fingerprint(pl_module)
        if here is not None and own["fingerprint"] not in (None, here):
            raise CheckpointError(
                f"it was trained on another base (fingerprint {own['fingerprint']}, this one is {here})",
                where=where,
                fix="set model.path (and model.revision) to the base of that run",
            )
        states, rank = own["random_states"], trainer.global_rank
        # Of as many processes each has its own; another number of them draws other numbers in any case.
        self._random_state = states[rank] if len(states) == trainer.world_size or not rank else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the random states back as late as can be: setting up loaders and models has drawn from them."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step that was gone on from is saved already; in the middle of the next window it would be another state."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._deferred, self._validated = False, None
        directory, step = Path(str(self.dirpath)), trainer.global_step
        self._foreign = set() if step else set(checkpoints(directory))
        best = best_checkpoint(directory, up_to=step) if step and trainer.is_global_zero else None
        self._lowest = trainer.strategy.broadcast(best[1] if best else math.inf)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where no step was left, Lightning passes its loops over: count as they would have at their end.

        What is measured after training is logged at that step and epoch.
        """
        loop = trainer.fit_loop
        if loop.epoch_loop._batches_that_stepped < trainer.global_step:
            loop.epoch_loop._batches_that_stepped = trainer.global_step
            epochs = loop.epoch_progress.current
            epochs.completed = epochs.processed = epochs.ready  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and at the last step.

        Here and not in ``on_train_end``: when a run stops in the middle of an epoch, Lightning counts that epoch as
        done before it calls that, and a resumed run would skip the rest of it.
        """
        every = self._every_n_train_steps
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if last or (every and trainer.global_step % every == 0):
            self.save(trainer)

    def save(self, trainer: Trainer) -> bool:
        """Save after a training batch; False where a validation comes first, and the checkpoint after it."""
        if self._should_skip_saving_checkpoint(trainer):
            return True
        fetcher = trainer.fit_loop._data_fetcher
        self._deferred = fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if self._deferred:
            return False
        # Lightning logs this step's figures only after this hook: a process killed in between has not written them.
        logged = trainer._logger_connector
        if trainer.loggers and logged.should_update_logs:
            figures = {name: float(value) for name, value in logged.metrics["log"].items()}
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._row = {"step": step, **figures, "epoch": float(trainer.current_epoch)}
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._row = None
        return True

    def saved(self, trainer: Trainer) -> bool:
        """Whether the steps made so far are in a checkpoint."""
        return self._last_global_step_saved == trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what had to wait, and a step that is better than all before it."""
        loss = trainer.callback_metrics.get(self.best_of)
        self._validated = None if loss is None or not loss.isfinite() else (trainer.global_step, float(loss))
        in_window = trainer.fit_loop.epoch_loop._should_accumulate()  # its gradients would be lost
        if self._should_skip_saving_checkpoint(trainer) or in_window:
            return
        better = self._validated is not None and self._validated[1] < self._lowest
        if better or self._deferred:
            self._deferred = False
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.best_k_models = {filepath: self.best_k_models[filepath]}  # with no limit Lightning never forgets one
        if trainer.is_global_zero:
            self._foreign.discard(Path(filepath))
            retain(Path(filepath).parent, self.keep, trainer.global_step, self._foreign)
        if self._validated and self._validated[0] == trainer.global_step:
            self._lowest = min(self._lowest, self._validated[1])

    def _fingerprint(self, pl_module: LightningModule) -> str | None:
        return self.fingerprint or getattr(pl_module, "base_fingerprint", None)


def _where(trainer: Trainer) -> str:
    return str(getattr(trainer, "ckpt_path", None) or "checkpoint")


def _what_trains(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name, and persistent buffers but those of modules whose own parameters are all frozen."""
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for prefix, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            continue
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                found[name] = buffer
    return found


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes with what trains; Lightning itself ignores what is absent, silently."""
    saved = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in _what_trains(module).items()}
    if saved != wanted:
        name = sorted(saved.items() ^ wanted.items())[0][0]
        raise CheckpointError(
            f"{name} is {saved.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} here",
            where=where,
            rule="what trains must be what was saved",
            fix="resume with the method.* keys of the first run",
        )


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint, plain data alone.

    Raises:
        CheckpointError: it is damaged, or holds objects that only pickle can make.
    """
    check(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError("no such checkpoint", where=path) from None
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise damaged(Path(path), f"it cannot be read: {reason}") from None
    assert isinstance(content, dict)
    return content
