"""An export's numbers beside the run's: codes, scales and zero points of its layers, bits of everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtrain.errors import ExportError, QtrainError
from qtrain.export.verify.count import KINDS, Count
from qtrain.export.verify.kv_cache import compare_cache
from qtrain.export.verify.stored import Stored
from qtrain.export.writer import Progress
from qtrain.models.quantized.layer import QuantizedLayer
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams
from qtrain.numerics.spec import Convention

SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes: two tensors are equal in them where all their bits are, the sign of zero too."""


@dataclass
class Comparison:
    """What comparing an export with its run gave.

    Attributes:
        counts: of codes, scales and zero points.
        tensors: how many plain tensors are equal bit by bit.
        lossy: layers whose codes were chosen when the export was written.
        other_inputs: layers whose inputs a consumer does not quantize as the training did.
        conventions: of the scales by token that inputs of layers were quantized with in training.
        layout: layers that are described otherwise than they were trained.
        names: tensors that are missing or too many.
        wrong: plain tensors of another shape, dtype or content.
    """

    counts: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    tensors: int = 0
    lossy: int = 0
    other_inputs: int = 0
    conventions: set[Convention] = field(default_factory=set)
    layout: list[QtrainError] = field(default_factory=list)
    names: list[QtrainError] = field(default_factory=list)
    wrong: list[QtrainError] = field(default_factory=list)


def compare(stored: Stored, deployed: DeployedModel, progress: Progress | None = None) -> Comparison:
    """Go through the run's tensors once; one layer of each side is in memory at a time."""
    result = Comparison()
    tensors = list(deployed.tensors())
    seen = set[str]()
    for tensor in progress(tensors, len(tensors)) if progress else tensors:
        name = tensor.name.removesuffix(".weight")
        layer = stored.layers.get(name)
        seen |= {tensor.name, name}
        result.other_inputs += not _same_inputs(layer, tensor)
        inputs = tensor.activation
        if inputs is not None and inputs.granularity == "per_token" and inputs.symmetric:
            result.conventions.add(inputs.convention)
        if layer is not None:
            _compare_layer(name, layer, tensor, stored.tells_symmetry, result)
        elif tensor.name in stored.others:
            if stored.layers and tensor.record is not None:
                result.layout.append(_not_in_codes(name))
            _compare_plain(tensor, stored, deployed.dtype, result)
        else:
            result.names.append(
                ExportError("it is missing", where=tensor.name, rule="an export has every tensor of the model")
            )
    surplus = [*stored.surplus, *(name for name in (*stored.others, *stored.layers) if name not in seen)]
    result.names += [
        ExportError("no tensor of the model is called so", where=name, rule="an export has the model's tensors alone")
        for name in surplus
    ]
    result.layout += _claims(stored)
    if stored.cache is not None:
        layout, names = compare_cache(stored.cache, deployed.cache, result.counts["scales"])
        result.layout += layout
        result.names += names
    return result


def _compare_layer(
    name: str, layer: QuantizedLayer, tensor: DeployedTensor, tells_symmetry: bool, result: Comparison
) -> None:
    if tensor.record is None or tensor.spec is None:
        result.lossy += 1
        if not tensor.linear:
            result.layout.append(
                ExportError("it is in codes", where=name, rule="heads and embeddings stay unquantized in this format")
            )
        return
    result.layout += _layout_problems(name, layer, tensor, tells_symmetry)
    try:
        found, own = layer.load(), tensor.record()
    except QtrainError as error:
        result.layout.append(error)
        return
    result.counts["codes"].add(name, found.codes, own.codes)
    ranges = layer.inputs.qparams if layer.inputs is not None else None
    if _words(ranges) != _words(own.inputs):
        result.layout.append(
            ExportError(
                f"a static range of inputs {_words(ranges)} there, {_words(own.inputs)} in the run",
                where=name,
                rule="an export holds the ranges of the last training step",
            )
        )
    result.counts["scales"].add(name, *_on_one_grid(found.scale, own.scale))
    if found.zero_point is not None or own.zero_point is not None:
        result.counts["zero points"].add(name, *_on_one_grid(_zero_point(found), _zero_point(own)))


def _layout_problems(
    name: str, layer: QuantizedLayer, tensor: DeployedTensor, tells_symmetry: bool
) -> Iterator[ExportError]:
    assert tensor.spec is not None
    if (layer.spec.bits, layer.spec.is_float) != (tensor.spec.bits, tensor.spec.is_float):
        yield ExportError(
            f"{layer.spec.format} weights there, {tensor.spec.format} in the run",
            where=name,
            rule="the header says what a weight is",
        )
    if tells_symmetry and layer.spec.symmetric != tensor.spec.symmetric:
        kinds = [("asymmetric", "symmetric")[spec.symmetric] for spec in (layer.spec, tensor.spec)]
        yield ExportError(
            f"called {kinds[0]} there, {kinds[1]} in the run",
            where=name,
            rule="kernels are chosen by what the header says of zero points",
        )
    there, own = layer.inputs and layer.inputs.spec, tensor.activation
    if (there and (there.format, there.symmetric, there.granularity)) != (
        own and (own.format, own.symmetric, own.granularity)
    ):
        words = [f"{spec.format} {spec.granularity}" if spec else "unquantized" for spec in (there, own)]
        yield ExportError(
            f"inputs {words[0]} there, {words[1]} in the run",
            where=name,
            rule="the header says what a layer's input is quantized to",
        )


def _same_inputs(layer: QuantizedLayer | None, tensor: DeployedTensor) -> bool:
    own = tensor.activation
    if own is None or layer is None or layer.inputs is None:
        return own is None
    # A scale a token is absmax / 127 or absmax / 127.5: that alone moves logits.
    return own.reach == layer.inputs.spec.reach or not own.symmetric or own.granularity != "per_token"


def _compare_plain(tensor: DeployedTensor, stored: Stored, dtype: torch.dtype, result: Comparison) -> None:
    found = stored.others[tensor.name]()
    if tuple(found.shape) != tensor.shape:
        what = f"shape {list(found.shape)} there, {list(tensor.shape)} in the run"
    elif not stored.own_dtypes and found.dtype != dtype:
        what = f"{found.dtype} there, {dtype} of all other tensors"
    else:
        own = tensor.value().to("cpu", found.dtype)
        integers = SAME_SIZE[own.element_size()]
        wrong = found.flatten().view(integers) != own.flatten().view(integers)
        if not bool(wrong.any()):
            result.tensors += 1
            return
        at = int(wrong.nonzero()[0, 0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), found.shape)]
        example = f"at {index} {found.flatten()[at].item():g} there, {own.flatten()[at].item():g} in the run"
        what = f"{int(wrong.sum()):,} of {wrong.numel():,} numbers differ, first {example}"
    result.wrong.append(
        ExportError(what, where=tensor.name, rule="what is not quantized is written bit by bit, in one dtype")
    )


def _claims(stored: Stored) -> Iterator[ExportError]:
    """Linears that the header takes for quantized, beside those that the files hold codes of."""
    for name in sorted({*stored.claimed} - {*stored.layers}):
        yield ExportError(
            "quantization_config takes it for quantized, and it has no codes",
            where=name,
            rule="the ignore list names every linear that stays unquantized",
        )
    for name in sorted({*stored.layers} - {*stored.claimed}):
        yield ExportError(
            "quantization_config takes it for unquantized, and it is in codes",
            where=name,
            rule="targets match every linear in codes, and the ignore list names none of them",
        )


def _not_in_codes(name: str) -> ExportError:
    return ExportError(
        "it is unquantized there, and was trained on codes",
        where=name,
        rule="every layer of codes is exported in codes",
    )


def _zero_point(record: LinearRecord) -> Tensor:
    """Zero points, zeros where there is no need of them."""
    return torch.zeros_like(record.scale, dtype=torch.int8) if record.zero_point is None else record.zero_point


def _on_one_grid(found: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """A scale a row or a long group repeated for each short group that it stands for: the same numbers."""
    found, own = found.cpu(), own.cpu()
    if found.ndim == own.ndim == 2 and found.shape[1] and own.shape[1]:
        if found.shape[1] % own.shape[1] == 0:
            return found, own.repeat_interleave(found.shape[1] // own.shape[1], dim=1)
        if own.shape[1] % found.shape[1] == 0:
            return found.repeat_interleave(own.shape[1] // found.shape[1], dim=1), own
    return found, own


def _words(qparams: QParams | None) -> str:
    """A static range, scale [1, 1] and zero point, to the last digit."""
    if qparams is None:
        return "none"
    zero = 0 if qparams.zero_point is None else qparams.zero_point.item()
    return f"scale {qparams.scale.item()!r} zero point {zero!r}"
