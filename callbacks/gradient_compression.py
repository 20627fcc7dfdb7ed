"""Fewer bytes between processes: what DDP sends of gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from qtrain.errors import ConfigError

Kind = Literal["bf16", "int8_tensor", "int8_channel"]


class GradientCompression(Callback):
    """DDP averages gradients rounded to bf16 (torch's own hook), or to int8 with error feedback.

    int8: c = round((g + e) / s), s = max|g + e| / 127 of each tensor or of each of its rows, and e = g + e - s c stays
    in the process for the next step (Seide 2014, 1-bit SGD; Karimireddy 2019, arXiv 1901.09847). Codes cannot be summed
    on the way: each of W processes receives W - 1 bytes a gradient, where fp32 takes 8 (W - 1) / W and bf16 half of
    that, so int8 is for two or three processes on a slow line. e is 4 bytes a trained parameter, and is not saved.

    Args:
        kind: ``bf16``, ``int8_tensor`` or ``int8_channel``.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise where nothing could be compressed.

        Raises:
            ConfigError: the strategy is not DDP.
        """
        check_strategy(trainer, self.kind)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of DDP's own average."""
        model = trainer.strategy.model
        assert isinstance(model, DistributedDataParallel)
        compress(model, self.kind)


def compress(model: DistributedDataParallel, kind: Kind) -> None:
    """Average gradients of ``kind`` from here on; once a model."""
    feedback, hook = (
        (None, bf16_compress_hook) if kind == "bf16" else (Feedback(by_row=kind == "int8_channel"), int8_hook)
    )
    # DDP refuses annotations that are text, and torch's hook on a CPU, by its name, although gloo sums bf16.
    model.register_comm_hook(feedback, lambda state, bucket: hook(state, bucket))


def check_strategy(trainer: Trainer, kind: str) -> None:
    """Raise unless DDP averages gradients.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(
            f"run.gradient_compression={kind} under {type(trainer.strategy).__name__}",
            rule="it compresses what DDP sends",
            fix="trainer.strategy=ddp trainer.devices=2, or run.gradient_compression=none",
        )


class Feedback:
    """What int8 has left out of each gradient so far, by parameter.

    Args:
        by_row: a scale for each row of a gradient, else one for each gradient.
    """

    def __init__(self, *, by_row: bool) -> None:
        self.by_row = by_row
        self._errors: dict[int, Tensor] = {}

    def encode(self, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8 [rows, columns], scales fp32 [rows, 1]); what they leave out is kept."""
        owed = self._rows(gradient).float()
        if (error := self._errors.get(id(parameter))) is not None:
            owed = owed + error
        scale = owed.abs().amax(dim=1, keepdim=True) / 127
        codes = (owed / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        self._errors[id(parameter)] = owed - codes * scale
        return codes, scale

    def _rows(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient) if self.by_row and gradient.ndim > 1 else 1, -1)


def int8_hook(state: Feedback, bucket: Any) -> torch.futures.Future[Tensor]:
    """The average over processes of their int8 gradients, in place of the bucket's (a torch.distributed.GradBucket)."""
    gradients = bucket.gradients()
    pairs = [state.encode(*pair) for pair in zip(bucket.parameters(), gradients, strict=True)]
    sent = torch.cat([part.reshape(-1).view(torch.uint8) for pair in pairs for part in pair])
    world = distributed.get_world_size()
    received = sent.new_empty(world * len(sent))
    work: Any = distributed.all_gather_into_tensor(received, sent, async_op=True)

    def average(_: Any) -> Tensor:
        sums = [torch.zeros(codes.shape, device=codes.device) for codes, _ in pairs]
        for message in received.view(world, -1):
            start = 0
            for total, (codes, scale) in zip(sums, pairs, strict=True):
                middle, end = start + codes.numel(), start + codes.numel() + scale.nbytes
                scales = message[middle:end].clone().view(torch.float32)  # aligned to 4 bytes
                total += message[start:middle].view(torch.int8).view(codes.shape) * scales.view(scale.shape)
                start = end
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_((total / world).view(gradient.shape))
        buffer: Tensor = bucket.buffer()
        return buffer

    return work.get_future().then(average)  # type: ignore[no-any-return]
