"""Products of bytes summed in int32 on a CPU: oneDNN's kernel for VNNI, of unsigned inputs and signed weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def pack_int8(codes: Tensor) -> Tensor:
    """Weight codes int8 [out, in] in the blocks of the kernel, an opaque tensor of as many bytes."""
    # For one row: generation is bound by reading it; of many rows the time is the same within 3 % (8192 x 2048).
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, [1, codes.shape[1]])
    return packed


def int8_product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """fp32 [rows, out]: (x q^T) s, where x q^T is the exact integer.

    Args:
        x: codes int8 [rows, in].
        packed: q by ``pack_int8``.
        scale: fp32 [out].
    """
    # Signed inputs go to a reference loop, 100 to 1000 times slower (oneDNN 3.12, AVX512 VNNI): u = x + 128.
    unsigned = x.view(torch.uint8) ^ 128
    none = torch.zeros(scale.numel(), dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scale, none, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@cache
def int8_product_is_exact() -> bool:
    """Whether this CPU has the instructions: without them (AVX2) oneDNN adds pairs in 16 bits, which saturate."""
    if not torch.backends.mkldnn.is_available():
        return False
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    found = int8_product(codes, pack_int8(codes), torch.ones(16))
    return bool((found == 64 * 127 * 127).all())
