"""Checkpoints of what trains, never of the frozen base, from which a run goes on bit-exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtrain.errors import CheckpointError
from qtrain.training.random_state import random_state, set_random_state

KEY = "qtrain"


class TrainableCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that keeps what trains, optimizer, schedule, data position and random states.

    Plain data only: files load with ``weights_only=True``. The last ``keep`` checkpoints stay. What trains: the
    trained parameters, and persistent buffers (running statistics, calibrated ranges) but those of frozen layers. The
    base is not written; its fingerprint is, and loading over another base is refused.

    Args:
        dirpath: where to.
        every_n_train_steps: optimizer steps between two; 0 is the end of each epoch.
        keep: checkpoints that stay on disk.
        fingerprint: which base this is; default: the module's ``base_fingerprint`` if it has one.
    """

    def __init__(
        self, dirpath: str, *, every_n_train_steps: int = 0, keep: int = 2, fingerprint: str | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            monitor="step",  # the last ones stay, whatever the loss
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps or None,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            enable_version_counter=False,
        )
        self.fingerprint = fingerprint
        self._random_state: dict[str, Any] | None = None
        self._check: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning accept a state without the base; what must be there is checked here."""
        super().setup(trainer, pl_module, stage)
        pl_module.strict_loading = False
        if stage == "fit":
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
        checkpoint[KEY] = {"fingerprint": self._fingerprint(pl_module), "random_state": random_state()}

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
        self._random_state = own["random_state"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the random states back as late as can be: setting up loaders and models has drawn from them."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and at the last step.

        Here and not in ``on_train_end``: when a run stops in the middle of an epoch, Lightning counts that epoch as
        done before it calls that, and a resumed run would skip the rest of it.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if last and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("no such checkpoint", where=path) from None
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read: {reason}", where=path, fix="resume from the one before it") from None
    assert isinstance(content, dict)
    return content
