"""Weights move until they round to the codes that a starting point chose, and no further."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import DataError
from qtrain.methods.method import Context, Progress, Text
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.start_config import keeps_range
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantizers
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import quantize
from qtrain.ptq.block_start import nearest_weights
from qtrain.ptq.start import Start
from qtrain.ptq.walk import quantize_blocks
from qtrain.registry import resolve


def begin_at(
    model: PreTrainedModel,
    options: QatOptions,
    *,
    text: Text | None,
    context: Context = nullcontext,
    progress: Progress | None = None,
) -> list[str]:
    """Let the quantized linears of ``model``, in place, begin at the codes and scales of ``options.init``.

    A weight that rounds to its code stays what it was, with all that it knows of how near the next code is; another
    one moves to just inside of its code's cell. A quantizer that keeps no range keeps none of these either: there the
    layer has only what was folded into it.

    Args:
        model: prepared, in fp32, its weights those of the full-precision model.

    Returns:
        Names of the layers that begin at the start's codes.

    Raises:
        DataError: no text for a start that looks at some.
    """
    assert options.init is not None
    section = options.start_options(options.init)
    rows: Sequence[Tensor] = ()
    if section.needs_text:
        rows = calibration_rows(f"method.init={options.init}", options.calibration_rows, text)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    specs = {name: layer.weight_quantizer.spec for name, layer in layers.items() if layer.weight_quantizer is not None}
    begun: list[str] = []

    def place(name: str, linear: nn.Linear, record: LinearRecord) -> None:
        assert isinstance(linear, QuantLinear) and linear.weight_quantizer is not None
        if keeps_range(linear.weight_quantizer.section):
            stays = quantize(linear.weight, record.qparams, record.spec) == record.codes
            linear.weight.copy_(torch.where(stays, linear.weight, nearest_weights(linear.weight, record)))
            linear.weight_quantizer.set(record.qparams)
            begun.append(name)
        for quantizer in _own(linear):
            quantizer.enabled = quantizer.ready  # ranges of inputs may be calibrated later

    start: Start[Any] = resolve(section.implementation)(section)
    with _off(layers.values()):
        quantize_blocks(model, specs, start, rows, place=place, context=context, progress=progress)
    return begun


@torch.no_grad()
def copied_parameters(model: nn.Module, stored: torch.dtype) -> dict[str, Tensor]:
    """Copies on the CPU of all parameters but the quantizers'; in the dtype ``stored`` where that loses nothing."""
    ranges = {id(parameter) for _, quantizer in quantizers(model) for parameter in quantizer.parameters(recurse=False)}
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in ranges:
            small = parameter.detach().to(stored)
            exact = small if torch.equal(small.to(parameter.dtype), parameter) else parameter.detach()
            found[name] = exact.to("cpu", copy=True)
    return found


@torch.no_grad()
def moved_since(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``before`` that ``model`` has other numbers for now."""
    own = {name: model.get_parameter(name) for name in before}
    return {name: kept for name, kept in before.items() if not torch.equal(kept.to(own[name]), own[name])}


@contextmanager
def with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, ``model`` has these numbers in the parameters of these names."""
    own = {name: model.get_parameter(name) for name in values}
    kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in own.items()}
    try:
        _fill(model, values)
        yield
    finally:
        _fill(model, kept)


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def calibration_rows(key: str, count: int, text: Text | None) -> Sequence[Tensor]:
    """``count`` rows of training text.

    Raises:
        DataError: ``key`` looks at text, and there is none.
    """
    if text is None:
        raise DataError(
            f"{key} looks at text, and there is none",
            rule="it takes rows of data.train",
            fix="set data.train, or what needs none: method.init=hqq, method.kv_cache.smooth=false",
        )
    return text(count)


def _own(layer: QuantLinear) -> list[Quantizer]:
    return [one for one in (layer.weight_quantizer, layer.input_quantizer) if one is not None]


@contextmanager
def _off(layers: Iterable[QuantLinear]) -> Iterator[None]:
    """Inside, layers multiply in full precision until they are placed; afterwards all are on."""
    every = [quantizer for layer in layers for quantizer in _own(layer)]
    try:
        for quantizer in every:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in every:
            quantizer.enabled = True
