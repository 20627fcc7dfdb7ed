"""One linear layer in the words of AWQ's GEMM kernel, from its record."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.export.integers.halves import fp16_scales
from qtrain.modules.record import LinearRecord
from qtrain.numerics.packing import pack
from qtrain.numerics.row_parts import over_rows

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs each nibble of a word holds, lowest first: the kernel unpacks two at a time."""


def awq_tensors(name: str, record: LinearRecord) -> dict[str, Tensor]:
    """``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8], ``scales`` fp16 [groups, out].

    w = (u - z) s with u = q + 8 and z likewise, 8 where the codes are symmetric (Lin 2023, arXiv 2306.00978; AutoAWQ).

    Raises:
        ExportError: scales that fp16 does not hold.
    """
    zero_point = torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point
    return {
        "qweight": _words(record.codes),
        "qzeros": _words(zero_point),
        "scales": fp16_scales(name, record).t(),
    }


def _words(codes: Tensor) -> Tensor:
    """Codes int8 [out, n] as int32 [n, out / 8]."""
    eights, columns = codes.unflatten(0, (-1, 8)), codes.shape[1]
    words = torch.empty(len(eights), columns, dtype=torch.int32, device=codes.device)

    def fill(rows: slice) -> None:
        ordered = eights[rows][:, list(COLUMN_OF_NIBBLE)].transpose(1, 2)
        words[rows] = pack(ordered.flatten(0, 1), 4).view(-1, columns)

    over_rows(fill, eights)
    return words.t()
