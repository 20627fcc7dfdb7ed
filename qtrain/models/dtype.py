"""Which number formats the device computes well in."""

from __future__ import annotations

import torch

from qtrain.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run on matrix units there.

    A CPU without AMX is not among them, even where it has the AVX512-BF16 instructions: a backward pass in bf16 is
    there up to 300 times slower than in fp32 (21 s against 0.07 s for one 2048x2048 layer, measured).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def resolve_dtypes(storage: str, compute: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of unquantized weights, dtype of products) for ``model.dtype`` and ``method.compute_dtype``.

    Raises:
        ModelError: weights in bf16 beside products in fp32, which no product can honour.
    """
    default = "bf16" if has_bf16(device) else "fp32"
    compute = default if compute in ("auto", "fp8") else compute  # fp8 is for frozen weights alone
    storage = compute if storage == "auto" else storage
    if (storage, compute) == ("bf16", "fp32"):
        raise ModelError(
            f"model.dtype=bf16 with products in fp32 on {device.type}",
            rule="weights stored in bf16 are multiplied in bf16",
            fix="model.dtype=fp32, or method.compute_dtype=bf16",
        )
    return DTYPES[storage], DTYPES[compute]
