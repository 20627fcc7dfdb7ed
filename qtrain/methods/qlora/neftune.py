"""NEFTune: noise on the embeddings while training (Jain 2023, arXiv 2310.05914)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel


def add_neftune(model: PreTrainedModel, alpha: float) -> None:
    """Add uniform noise of amplitude alpha / sqrt(L d) to the embeddings [B, L, d] in training mode."""

    def noise(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        amplitude = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-amplitude, amplitude)

    model.get_input_embeddings().register_forward_hook(noise)
