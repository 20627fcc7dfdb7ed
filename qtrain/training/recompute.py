"""Which activations the backward computes again instead of keeping them (Chen 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qtrain.errors import ModelError
from qtrain.training.recompute_offload import OffloadedInputs

LEVELS = ("none", "selective", "full", "offload")
"""From the fastest to the one that takes the least memory."""


class Recompute:
    """The level of a model's decoder layers; losses and gradients are the same at all of them.

    - ``none``: every layer keeps what its backward needs.
    - ``selective``: the first ``count`` layers keep their input alone and run again in the backward. The first, because
      their turn comes last: what the others kept is gone by then.
    - ``full``: all layers do.
    - ``offload``: likewise, and the inputs wait in pinned host memory.

    Whole layers, not a choice of operations: that asks nothing of the layers, whose fused kernels trim their own
    activations, and any share of them can be taken.

    Attributes:
        level: one of LEVELS.
        count: layers that run again.
        reason: why this level, in words.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Setting the two attributes is the layers' own interface; the model's method for it has another name in
        # transformers 5.23, warns about the old one, and makes the embeddings ask for gradients that nobody needs.
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.kind = str(model.config.model_type)
        self.level, self.count, self.reason = "none", 0, ""

    def set(self, level: str, count: int | None = None, reason: str = "") -> None:
        """Go to a level; ``count`` layers of ``selective`` (default: half).

        Raises:
            ModelError: the model's layers cannot run again.
        """
        total = len(self.layers)
        if level != "none" and not total:
            raise ModelError(
                f"run.recompute={level}: no layer of {self.kind} can be computed again",
                rule="layers are transformers' GradientCheckpointingLayer",
                fix="run.recompute=none, and a smaller data.batch_size or data.max_length",
            )
        half = (total + 1) // 2 if count is None else count
        self.level, self.reason = level, reason
        self.count = {"none": 0, "selective": half}.get(level, total)
        run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        if level == "offload":
            run = OffloadedInputs()
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < self.count
            layer._gradient_checkpointing_func = run  # type: ignore[assignment]

    def lower(self, reason: str = "") -> bool:
        """One level down; False where there is none."""
        following = LEVELS[LEVELS.index(self.level) + 1 :]
        if not following or not self.layers:
            return False
        # Of one layer half is all.
        level = "full" if following[0] == "selective" and len(self.layers) == 1 else following[0]
        self.set(level, reason=reason)
        return True

    @property
    def name(self) -> str:
        """The level, and the share of the layers."""
        share = f", the first {self.count} of {len(self.layers)} layers" if self.level == "selective" else ""
        return self.level + share

    def __str__(self) -> str:
        return self.name + (f": {self.reason}" if self.reason else "")


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of what trains."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def free_bytes(device: torch.device) -> int | None:
    """What tensors can still take on a GPU, blocks that the allocator holds unused included; None of a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
