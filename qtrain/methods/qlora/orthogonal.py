"""Adapters that start off zero in their product alone."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

SCALE = 0.1


def start_orthogonal(layer: LoraLayer, adapter: str) -> None:
    """Draw A = s P X [r, in] and B = s Y N^T [out, r] with N^T P = 0: neither is zero, B A is.

    P and N [r, r/2] are the halves of a random orthogonal matrix, X and Y normal, s = 0.1, as
    https://datta0.github.io/posts/rethink-lora-init has it. PEFT's own ``init_lora_weights="orthogonal"`` casts to
    the dtype of the base's weight, which over 4 and 8 bits is an integer (PEFT 0.21).
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    half = a.shape[0] // 2
    with torch.no_grad():
        mixing = nn.init.orthogonal_(torch.empty(2 * half, 2 * half))
        left = SCALE * mixing[:, :half] @ torch.randn(half, a.shape[1])
        right = SCALE * torch.randn(b.shape[0], half) @ mixing[:, half:].t()
        a.copy_(left)
        b.copy_(right)
