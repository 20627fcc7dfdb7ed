"""AWQ read back: everything but ``modules_to_not_convert``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from qtrain.export.verify.quantized import read_quantized
from qtrain.export.verify.stored import Stored

PARTS = ("qweight", "qzeros", "scales")


def read(directory: Path, linears: Mapping[str, nn.Linear]) -> Stored:
    """Words by ``qtrain.models.quantized.awq``."""
    return read_quantized(
        "awq",
        directory,
        linears,
        claims=_claims,
        parts=lambda layer, there: PARTS,
        header_is={"zero_point": True, "version": "gemm"},
        tells_symmetry=False,
    )


def _claims(header: Mapping[str, Any], linears: Mapping[str, nn.Linear]) -> Collection[str]:
    kept = header.get("modules_to_not_convert") or []
    return [name for name in linears if should_convert_module(name, kept)]
