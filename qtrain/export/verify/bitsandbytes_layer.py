"""One layer of a bitsandbytes directory, by its bytes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qtrain.errors import ExportError, QtrainError
from qtrain.export.verify.count import Count
from qtrain.models.quantized.tensors import TensorFiles

STATE = "weight.quant_state.bitsandbytes__"
NESTED_BLOCK = 256


@dataclass
class Codes:
    """What comparing layers gave.

    Attributes:
        counts: of codes and scales.
        names: tensors of a layer that are missing or too many.
        layout: tensors of another shape or dtype, other maps, other words of their description.
    """

    counts: dict[str, Count] = field(default_factory=lambda: {"codes": Count(), "scales": Count()})
    names: list[QtrainError] = field(default_factory=list)
    layout: list[QtrainError] = field(default_factory=list)


def stored_scheme(tensors: TensorFiles, name: str) -> tuple[str, bool]:
    """nf4, fp4 or int8, and whether block scales are in 8 bits, by the names of a layer's tensors."""
    for kind in ("nf4", "fp4"):
        if f"{name}.{STATE}{kind}" in tensors:
            return kind, f"{name}.weight.nested_absmax" in tensors
    return "int8", False


def compare_layer(
    tensors: TensorFiles, name: str, shape: tuple[int, ...], there: Collection[str], live: nn.Module | None, to: Codes
) -> None:
    """Add what a layer's tensors are to ``to``.

    Args:
        shape: [out, in] of the weight.
        there: names of the tensors in the files that begin with the layer's.
        live: the layer that was trained over; None where the export chose the codes.

    Raises:
        ModelError: a tensor of no dtype or shape that its place has.
    """
    kind, nested = stored_scheme(tensors, name) if live is None else scheme_of(live)
    told = _told(tensors, name, kind, to)
    own, words = ({}, {"quant_type": kind, "shape": list(shape)}) if live is None else _of_run(live)
    expected = _expected(kind, nested, shape, int(words.get("blocksize") or told.get("blocksize") or 64))
    for part in sorted(expected.keys() | {key.removeprefix(f"{name}.") for key in there}):
        key = f"{name}.{part}"
        if part not in expected:
            to.names.append(ExportError("no tensor of the layer is called so", where=key, rule=_rule(kind)))
        elif key not in tensors:
            to.names.append(ExportError("it is missing", where=key, rule=_rule(kind)))
    if any(f"{name}.{part}" not in tensors for part in expected):
        return
    for part, (size, dtype) in expected.items():
        if size is not None:
            tensors.check(f"{name}.{part}", size, [dtype], f"a weight {list(shape)} in {kind}")
    if kind != "int8":
        known = told.keys() - {"nested_offset"} if live is not None else words.keys()
        _same_words({key: told.get(key) for key in known}, words, name, to)
    for part, mine in own.items():
        mine, key = mine.cpu(), f"{name}.{part}"
        if part == "offset":
            offset = torch.tensor([float(told.get("nested_offset", torch.nan))], dtype=torch.float64)
            to.counts["scales"].add(f"{name}: nested_offset", offset, mine.double().reshape(1))
        elif part == "weight":
            to.counts["codes"].add(name, *(_codes(it, kind, shape) for it in (tensors.get(key), mine)))
        elif part in ("weight.absmax", "weight.nested_absmax", "SCB"):
            to.counts["scales"].add(key, tensors.get(key), mine)
        elif not torch.equal(tensors.get(key), mine):
            to.layout.append(ExportError("it differs", where=key, rule=f"all of {kind} have the same one"))


def scheme_of(live: nn.Module) -> tuple[str, bool]:
    """``stored_scheme`` of the layer that was trained over."""
    if isinstance(live, bnb.nn.Linear8bitLt):
        return "int8", False
    weight = live.weight
    assert isinstance(weight, bnb.nn.Params4bit) and weight.quant_state is not None
    return str(weight.quant_type), bool(weight.quant_state.nested)


def _expected(
    kind: str, nested: bool, shape: tuple[int, ...], block: int
) -> dict[str, tuple[list[int] | None, torch.dtype]]:
    """Shape and dtype of each tensor of a layer; a description has any length."""
    rows, columns = shape
    if kind == "int8":
        return {
            "weight": ([rows, columns], torch.int8),
            "SCB": ([rows], torch.float32),
            "weight_format": ([], torch.uint8),
        }
    blocks = -(-rows * columns // block)
    parts: dict[str, tuple[list[int] | None, torch.dtype]] = {
        "weight": ([-(-rows * columns // 2), 1], torch.uint8),
        "weight.absmax": ([blocks], torch.uint8 if nested else torch.float32),
        "weight.quant_map": ([16], torch.float32),
        f"{STATE}{kind}": (None, torch.uint8),
    }
    if nested:
        parts["weight.nested_absmax"] = ([-(-blocks // NESTED_BLOCK)], torch.float32)
        parts["weight.nested_quant_map"] = ([256], torch.float32)
    return parts


def _told(tensors: TensorFiles, name: str, kind: str, to: Codes) -> dict[str, Any]:
    """What the JSON among a layer's tensors says."""
    key = f"{name}.{STATE}{kind}"
    if key not in tensors:
        return {}
    try:
        return dict(json.loads(bytes(tensors.get(key).tolist())))
    except (ValueError, TypeError) as error:
        to.layout.append(ExportError(f"it is no JSON: {error}", where=key, rule=_rule(kind)))
        return {}


def _same_words(told: Mapping[str, Any], own: Mapping[str, Any], name: str, to: Codes) -> None:
    for key in sorted(told.keys() | own.keys()):
        if told.get(key) != own.get(key):
            to.layout.append(
                ExportError(
                    f"quant_state.{key} is {told.get(key)!r} there, {own.get(key)!r} in the run",
                    where=name,
                    rule="bitsandbytes dequantizes by it",
                )
            )


def _of_run(live: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The layer's numbers as it computes with them, and what is to be told of them."""
    if isinstance(live, bnb.nn.Linear8bitLt):
        assert live.state.CB is not None and live.state.SCB is not None
        zero = torch.tensor(0, dtype=torch.uint8)
        return {"weight": live.state.CB, "SCB": live.state.SCB, "weight_format": zero}, {}
    assert isinstance(live.weight, bnb.nn.Params4bit)
    state = live.weight.quant_state
    assert state is not None
    own = {"weight": live.weight.data.view(torch.uint8), "weight.absmax": state.absmax, "weight.quant_map": state.code}
    words = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    if state.nested:
        own |= {
            "weight.nested_absmax": state.state2.absmax,
            "weight.nested_quant_map": state.state2.code,
            "offset": state.offset,
        }
        words |= {
            "nested_blocksize": state.state2.blocksize,
            "nested_dtype": str(state.state2.dtype).removeprefix("torch."),
        }
    return own, words


def _codes(stored: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Codes [out, in]: of 4 bits the high nibble is the first."""
    if kind == "int8":
        return stored
    nibbles = torch.stack((stored.flatten() >> 4, stored.flatten() & 15), dim=-1)
    return nibbles.flatten()[: shape[0] * shape[1]].view(shape)


def _rule(kind: str) -> str:
    return f"a layer in {kind} has the tensors that bitsandbytes saves of it, and no others"
