"""A learning rate of their own for a few parameters, whatever optimizer and schedule they are in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qtrain.errors import ModelError


class OwnLearningRate:
    """Multiplies an optimizer's update of some parameters by lr / base lr of their group: p0 + (p1 - p0) lr / base.

    An optimizer's update is proportional to its learning rate (SGD, Adam and AdamW with their decay, Adagrad, ...), so
    this is what a parameter group with that rate would do, and the schedule is followed. Groups of their own would have
    to be made before the scheduler, which keeps a list with an entry for each group and is built in code that is not
    ours; and a checkpoint written without them could not be resumed.

    Args:
        optimizer: whose steps are changed until ``remove``.
        parameters: those of them that the optimizer has are concerned.
        lr: before the schedule.

    Raises:
        ModelError: a group of them whose base rate is 0.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], lr: float) -> None:
        wanted = set(parameters)
        self._parameters: list[Tensor] = []
        self._ratios: list[float] = []
        for group in optimizer.param_groups:
            base = float(group.get("initial_lr", group["lr"]))
            found = [parameter for parameter in group["params"] if parameter in wanted]
            if found and base == 0:
                raise ModelError("a learning rate of their own for parameters whose group has lr=0", fix="lr above 0")
            self._parameters += found
            self._ratios += [lr / base for _ in found]
        self._before: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        if self._parameters:
            self._handles = [
                optimizer.register_step_pre_hook(self._remember),
                optimizer.register_step_post_hook(self._rescale),
            ]

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _rescale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        updates = torch._foreach_sub(self._parameters, self._before)
        torch._foreach_mul_(updates, self._ratios)
        torch._foreach_add_(self._before, updates)
        torch._foreach_copy_(self._parameters, self._before)
        self._before = []
