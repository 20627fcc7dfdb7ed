"""Stops before a step that would ruin the weights, and says where it went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from qtrain.callbacks.checkpoint_files import checkpoints
from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.callbacks.training_batches import untracked
from qtrain.errors import CheckpointError, ModelError
from qtrain.training.gradients import OnHost, gradients_of, leaves_out, norms
from qtrain.training.processes import gather, size


@dataclass
class _Look:
    """At one optimizer step: what has to be known of it if it was a bad one.

    Attributes:
        batches: of its losses, each with its number.
        step, epoch, batch_idx: where training is.
        parameters: all that have gradients, but where a scaler looks after them.
        norms: of each gradient; None of sharded ones, which are there until the step.
        bad: 1 where any number is not finite, fp32 [].
    """

    losses: Tensor
    batches: list[tuple[Any, int]]
    step: int
    epoch: int
    batch_idx: int
    parameters: list[nn.Parameter]
    norms: Tensor | None
    bad: Tensor

    def position(self, batch_idx: int) -> str:
        """In words."""
        return f"step {self.step} (epoch {self.epoch}, batch {batch_idx})"


class NanGuard(Callback):
    """Raises ModelError where a loss or a gradient is not finite, naming the layer; no step is taken on such a one.

    Loss: the batch is run again with a hook on every module, and the first output that is not finite is named (the
    innermost module, since it returns first). Gradients: non-finite values flow from the loss towards the input, so
    the guilty layer is the one nearest the loss.

    Cost: a norm of each gradient, and one look at them and at the losses of an accumulation window, once per optimizer
    step. On a GPU an optimizer that leaves out steps by itself is told there, as ``found_inf``, and the host looks one
    step later: waited for at once, the GPU had nothing to do for 6 of 330 ms, and on a slow host, which needs as long
    for a forward pass, for 60. Other optimizers are waited for. Validation, checkpoints and the end come after a look.
    Batches of the window are kept until then. With an fp16 scaler only losses are checked: it skips steps that
    overflow by itself.
    """

    def __init__(self) -> None:
        self._batch: tuple[Any, int] = (None, 0)
        self._losses: list[Tensor] = []
        self._batches: list[tuple[Any, int]] = []
        self._open: tuple[_Look, OnHost] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._losses, self._batches, self._open = [], [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, in case it has to be run again."""
        self._batch = (batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss, without waiting for it."""
        self._losses.append(loss.detach().sum())
        self._batches.append(self._batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses and gradients of this step, or of the one before.

        Raises:
            ModelError: one of them is not finite.
        """
        self._close(trainer, pl_module)
        look = self._look(trainer, optimizer)
        if _later(look, optimizer):
            optimizer.found_inf = look.bad  # type: ignore[attr-defined]
            self._open = look, OnHost(look.bad)
        elif look.bad:
            _refuse(trainer, pl_module, look)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step."""
        self._close(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the last step, before anything is written."""
        self._close(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step."""
        self._close(trainer, pl_module)
        _forget(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What this callback told an optimizer would hold for steps that others take with it."""
        _forget(trainer)

    def _look(self, trainer: Trainer, optimizer: Optimizer) -> _Look:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        groups = [] if scaled else optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        gradients = gradients_of(optimizer) if parameters else []
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        # The largest magnitude, not the 2-norm: squares overflow where the gradients themselves are still finite.
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            found, largest = None, torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
            largest = largest.full_tensor() if isinstance(largest, DTensor) else largest
        else:
            found = norms(gradients) if gradients else losses.new_zeros(1)
            largest = found.amax()
        bad = (~torch.isfinite(losses.sum().to(largest.device) + largest)).float()
        if size() > 1:  # all stop, or none: one alone would be waited for
            bad = torch.as_tensor(trainer.strategy.reduce(bad, reduce_op="max"))
        position = trainer.global_step, trainer.current_epoch, self._batch[1]
        look = _Look(losses, self._batches, *position, parameters, found, bad)
        self._losses, self._batches = [], []
        return look

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what was found in the step before."""
        known, self._open = self._open, None
        if known is not None and known[1].get():
            _refuse(trainer, pl_module, known[0])


def _later(look: _Look, optimizer: Optimizer) -> bool:
    """Whether the GPU leaves the step out by itself, so that the host need not wait."""
    return look.bad.is_cuda and leaves_out(optimizer) and look.norms is not None


def _forget(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        if getattr(optimizer, "found_inf", None) is not None:
            optimizer.found_inf = None  # type: ignore[attr-defined]


def _refuse(trainer: Trainer, pl_module: LightningModule, look: _Look) -> None:
    for rank, what in enumerate(gather(_bad_loss(trainer, pl_module, look))):
        if what is not None:
            raise ModelError(
                what,
                where=f"process {rank}" if size() > 1 else None,
                rule="no step is taken on a loss that is not finite",
                fix=f"a lower learning rate, gradient_clip_val=1.0, or a look at that batch{_last_good(trainer)}",
            )
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    bad = {id(parameter) for parameter in _bad_gradients(look)}
    # Parameters are registered in the order of the forward pass: the last one is nearest the loss.
    known = [name for key, name in names.items() if key in bad]
    nearest = f"nearest the loss: {known[-1]}" if known else "none of them a parameter of the module"
    raise ModelError(
        f"the loss is finite but {len(bad)} of {len(look.parameters)} gradients are not at "
        f"{look.position(look.batch_idx)}; {nearest}",
        rule="no step is taken on gradients that are not finite",
        fix="gradient_clip_val does not cure this; look for a root, a logarithm or a division at 0 in that layer"
        + _last_good(trainer),
    )


def _bad_loss(trainer: Trainer, pl_module: LightningModule, look: _Look) -> str | None:
    bad = (~look.losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    batch, batch_idx = look.batches[bad[0]]
    layer = _first_bad_output(trainer, pl_module, batch, batch_idx)
    return f"the loss is {look.losses[bad[0]].item()} at {look.position(batch_idx)}; {layer}"


def _bad_gradients(look: _Look) -> list[nn.Parameter]:
    if look.norms is not None:
        finite = look.norms.isfinite().tolist()
        return [parameter for parameter, good in zip(look.parameters, finite, strict=False) if not good]
    return [p for p in look.parameters if p.grad is not None and not bool(p.grad.isfinite().all())]


def _last_good(trainer: Trainer) -> str:
    """Where training can go on from: the newest checkpoint of finite weights; empty where none are written."""
    directory = getattr(trainer.checkpoint_callback, "dirpath", None)
    if directory is None:
        return ""
    for path in reversed(checkpoints(Path(directory))):
        try:
            weights = read_checkpoint(str(path))["state_dict"].values()
        except CheckpointError:
            continue
        if all(bool(weight.isfinite().all()) for weight in weights if weight.is_floating_point()):
            return f"; the last good checkpoint is {path}"
    return "; there is no good checkpoint yet"


class _Found(Exception):
    """The hook's way out of the forward pass."""


def _first_bad_output(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> str:
    """Run the batch once more and tell the first module whose output is not finite."""
    if not pl_module.automatic_optimization:
        return "with manual optimization the batch cannot be run again to find the layer"
    if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
        return "the model is sharded, and one process cannot run the batch again to find the layer"
    try:
        with _watched(pl_module), untracked(pl_module), torch.no_grad(), trainer.precision_plugin.train_step_context():
            pl_module.training_step(batch, batch_idx)
    except _Found as found:
        return f"first output that is not finite: {found}"
    return "every module's output is finite: it goes wrong in the loss itself, or by chance (dropout)"


@contextmanager
def _watched(pl_module: LightningModule) -> Iterator[None]:
    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                    kind = "nan" if tensor.isnan().any() else "inf"
                    weights = [key for key, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
                    raise _Found(f"{name} ({kind})" + (f", whose {weights[0]} is not finite either" if weights else ""))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in pl_module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
