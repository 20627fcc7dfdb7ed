"""One linear layer in GPTQ's words, from its record."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ExportError
from qtrain.export.integers.halves import fp16_scales
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import pack, pack_rows


def gptq_tensors(name: str, record: LinearRecord, version: int) -> dict[str, Tensor]:
    """``qweight`` int32 [in b / 32, out], ``qzeros`` int32 [groups, ceil(out b / 32)], ``scales`` fp16 [groups, out],
    ``g_idx`` int32 [in] (Frantar 2022, arXiv 2210.17323; AutoGPTQ).

    w = (u - z) s with u = q + 2^(b-1) and z likewise, 2^(b-1) where the codes are symmetric. Fields are filled from the
    lowest bit of a word on, what no output fills is 0. v1 stores z - 1, v2 stores z.

    Raises:
        ExportError: scales that fp16 does not hold, or zero points of 0 in v1.
    """
    bits, columns = record.spec.bits, record.codes.shape[1]
    zero_point = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
    if version == 1:
        if int(zero_point.min()) == -(1 << (bits - 1)):
            raise ExportError(
                "zero points of 0", where=name, rule="v1 stores them less one, as unsigned", fix="export.layout=v2"
            )
        zero_point = zero_point - 1
    size = columns // record.scale.shape[1]
    return {
        "qweight": pack_rows(record.codes, bits).t(),
        "qzeros": pack(zero_point.t().contiguous(), bits),
        "scales": fp16_scales(name, record).t(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }
