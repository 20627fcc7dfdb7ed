"""Arithmetic of a training step, and what a device can do at most."""

from __future__ import annotations

import math

import torch
from torch import nn

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the longer name comes first.

Lightning's own table holds the figures with sparsity for H200 and H100 NVL, which would halve the MFU.
"""


def flops_per_token(model: nn.Module) -> int:
    """FLOPs of one training step per token by the frozen-base formula: 4 P_frozen + 6 P_trained.

    P counts the weights of products: 2 P forward, 2 P for the gradient of the inputs, 2 P more for the gradient of the
    weights where they train. Every weight of two or more dimensions counts but embeddings; a 4-bit one by its true
    shape, not by its bytes. Attention's own products and recomputation are left out, as is usual for MFU. All
    experts of a mixture count.
    """
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or isinstance(module, nn.Embedding):
            continue
        # bitsandbytes packs two 4-bit weights into a byte and keeps their shape beside them.
        shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
        if len(shape) > 1:
            total += (6 if weight.requires_grad else 4) * math.prod(shape)
    return total


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
