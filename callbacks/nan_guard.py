"""Stops before a step that would ruin the weights, and says where it went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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
from qtrain.training.processes import gather, size


class NanGuard(Callback):
    """Raises ModelError before an optimizer step with a non-finite loss or gradient, naming the layer.

    Loss: the batch is run again with a hook on every module, and the first output that is not finite is named (the
    innermost module, since it returns first). Gradients: non-finite values flow from the loss towards the input, so
    the guilty layer is the one nearest the loss.

    Cost: the losses of an accumulation window are added up on the device without waiting; one reduction over the
    gradients and one look at both, once per optimizer step, is the only time the host waits. Batches of the
    window are kept until then. With an fp16 scaler only losses are checked: it skips steps that overflow by itself.
    """

    def __init__(self) -> None:
        self._batch: tuple[Any, int] = (None, 0)
        self._losses: list[Tensor] = []
        self._batches: list[tuple[Any, int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._losses, self._batches = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, in case it has to be run again."""
        self._batch = (batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss, without waiting for it."""
        self._losses.append(loss.detach().sum())
        self._batches.append(self._batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses and gradients of this step.

        Raises:
            ModelError: one of them is not finite.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        checked = [] if scaled else parameters
        # The largest magnitude, not the 2-norm: squares overflow where the gradients themselves are still finite.
        norm = torch.nn.utils.get_total_norm([p.grad for p in checked if p.grad is not None], norm_type=math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        bad = (~torch.isfinite(losses.sum().to(norm.device) + norm)).float()
        if size() > 1:  # all stop, or none: one alone would be waited for
            bad = trainer.strategy.reduce(bad, reduce_op="max")
        if bad:
            self._refuse_loss(trainer, pl_module, losses)
            self._refuse_gradients(trainer, pl_module)
        self._losses, self._batches = [], []

    def _refuse_loss(self, trainer: Trainer, pl_module: LightningModule, losses: Tensor) -> None:
        for rank, what in enumerate(gather(self._bad_loss(trainer, pl_module, losses))):
            if what is not None:
                raise ModelError(
                    what,
                    where=f"process {rank}" if size() > 1 else None,
                    rule="no step is taken on a loss that is not finite",
                    fix=f"a lower learning rate, gradient_clip_val=1.0, or a look at that batch{_last_good(trainer)}",
                )

    def _bad_loss(self, trainer: Trainer, pl_module: LightningModule, losses: Tensor) -> str | None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad:
            return None
        batch, batch_idx = self._batches[bad[0]]
        layer = _first_bad_output(trainer, pl_module, batch, batch_idx)
        return f"the loss is {losses[bad[0]].item()} at {_position(trainer, batch_idx)}; {layer}"

    def _refuse_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        # Parameters are registered in the order of the forward pass: the last one is nearest the loss.
        nearest = f"nearest the loss: {bad[-1]}" if bad else "none of them a parameter of the module"
        raise ModelError(
            f"the loss is finite but {len(bad)} of {len(gradients)} gradients are not at "
            f"{_position(trainer, self._batch[1])}; {nearest}",
            rule="no step is taken on gradients that are not finite",
            fix="gradient_clip_val does not cure this; look for a root, a logarithm or a division at 0 in that layer"
            + _last_good(trainer),
        )


def _position(trainer: Trainer, batch_idx: int) -> str:
    return f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx})"


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
