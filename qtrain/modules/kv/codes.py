"""Keys or values held as codes: what a cache stores of one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtrain.modules.kv.layout import Layout
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import FLOAT_DTYPES, QParams
from qtrain.numerics.packing import pack, unpack

PACKED = (2, 4)
"""Codes of so many bits share 32-bit words; others take a byte each."""


class Codes:
    """Keys or values of a layer, appended and read as [B, H, n, D].

    ``read`` gives bit for bit what ``quantizer`` gives the training graph. A range kept for all tokens is stored once.
    Where the quantizer is off, numbers are stored as they come.
    """

    def __init__(self, quantizer: Quantizer, layout: Layout) -> None:
        self.quantizer, self.layout = quantizer, layout
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._stored: dict[str, Tensor] = {}  # dimension 0 is the batch, 2 counts rows' tokens
        self._common: QParams | None = None
        self._heads = self._row = self._tokens = 0
        self._dtype = torch.float32

    def __len__(self) -> int:
        """Tokens."""
        return self._tokens

    def append(self, x: Tensor) -> None:
        """Store the codes of [B, H, n, D]; for groups of tokens, n is a multiple of their size."""
        if x.shape[2] == 0:
            return
        rows = self.layout.rows(x)
        self._heads, self._row, self._dtype = x.shape[1], rows.shape[-1], x.dtype
        self._tokens += x.shape[2]
        for name, new in self._encode(rows).items():
            old = self._stored.get(name)
            self._stored[name] = new if old is None else torch.cat([old, new], dim=2)

    def read(self) -> Tensor:
        """All of it, [B, H, n, D] in the dtype that was appended."""
        codes = self._stored["codes"]
        if not self._coding:
            return self.layout.heads(codes, self._heads)
        codes = self._unpacked(codes)
        qparams = self._common
        if qparams is None:
            zero_point = self._stored.get("zero_point")
            qparams = QParams(
                self._stored["scale"].flatten(0, -2), None if zero_point is None else zero_point.flatten(0, -2)
            )
        return self.layout.heads(self.quantizer.dequantize(codes, qparams, self._dtype), self._heads)

    def codes(self) -> Tensor:
        """The codes of all tokens in the layout's rows, unpacked."""
        return self._unpacked(self._stored["codes"])

    def reorder(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor by what ``change`` makes of it along the batch."""
        self._stored = {name: change(tensor) for name, tensor in self._stored.items()}

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``; one row of codes is one token's."""
        self._stored = {name: tensor[:, :, :tokens].clone() for name, tensor in self._stored.items()}
        self._tokens = tokens

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and zero points included."""
        common = [] if self._common is None else [one for one in self._common if one is not None]
        return sum(tensor.nbytes for tensor in (*self._stored.values(), *common))

    @property
    def numel(self) -> int:
        """Numbers stored."""
        if not self._stored:
            return 0
        codes = self._stored["codes"]
        return codes.shape[:-1].numel() * self._row

    @property
    def _coding(self) -> bool:
        return self.quantizer.enabled and self.quantizer.observer is None

    @property
    def _packs(self) -> bool:
        return self.quantizer.spec.bits in PACKED

    def _encode(self, rows: Tensor) -> dict[str, Tensor]:
        if not self._coding:
            return {"codes": rows.contiguous()}
        codes, qparams = self.quantizer.codes(rows)
        if self._packs:
            codes = pack(codes.flatten(0, -2), self.quantizer.spec.bits).view(*codes.shape[:-1], -1)
        elif self.quantizer.spec.is_float:
            codes = codes.view(torch.uint8)  # torch joins and indexes bytes on every device, float8 not
        found = {"codes": codes}
        if self.quantizer.spec.granularity == "per_tensor":
            self._common = qparams
            return found
        found["scale"] = qparams.scale.view(*rows.shape[:-1], -1)
        if qparams.zero_point is not None:
            found["zero_point"] = qparams.zero_point.view(*rows.shape[:-1], -1)
        return found

    def _unpacked(self, codes: Tensor) -> Tensor:
        spec = self.quantizer.spec
        if self._packs:
            return unpack(codes.flatten(0, -2), spec.bits, self._row).view(*codes.shape[:-1], self._row)
        return codes.view(FLOAT_DTYPES[spec.format]) if spec.is_float else codes
