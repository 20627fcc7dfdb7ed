"""Ranges of activations from batches, before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.errors import ModelError
from qtrain.modules.quantizer import Quantizer
from qtrain.modules.quantizers import quantized_weights, quantizers, weight_of


def to_calibrate(model: nn.Module) -> dict[str, Quantizer]:
    """Quantizers of activations whose range comes from data, by name: static and learned ones without ``bounds``, and
    PACT's where ``pact_alpha`` was not given.
    """
    return {name: quantizer for name, quantizer in quantizers(model) if _from_data(quantizer)}


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> list[str]:
    """Run ``batches`` through ``model`` (evaluation mode, no gradients) and set the ranges of its activations.

    Weights stay on their levels meanwhile; activations are looked at and handed through. Batch normalizations that have
    seen no batch yet take each batch's own statistics, as training will.

    Args:
        batches: mappings (keyword arguments), tuples (positional ones) or tensors, or whatever ``forward`` takes.
        forward: runs one batch; default: ``model`` itself.

    Returns:
        Names of the quantizers that were calibrated.

    Raises:
        ModelError: a quantizer that no batch reached; the others have their ranges.
    """
    start_weights(model)
    observed = to_calibrate(model)
    if not observed:
        return []
    for quantizer in observed.values():
        quantizer.observe()
    try:
        with _evaluation(model), torch.no_grad():
            for batch in batches:
                _call(model, batch) if forward is None else forward(batch)
    except BaseException:
        for quantizer in observed.values():
            quantizer.observer = None
        raise
    settle(observed)
    return list(observed)


def start_weights(model: nn.Module, *, again: bool = False) -> None:
    """Set static and learned ranges of weights from the weights as they are now.

    Args:
        again: also those that have a range already; else only what was made without numbers, on the meta device.
    """
    for _, layer, quantizer in quantized_weights(model):
        section = quantizer.section
        if section.range in ("static", "learned") and section.bounds is None and (again or not quantizer.ready):
            with torch.no_grad():
                quantizer.start(weight_of(layer).detach())


def settle(observed: Mapping[str, Quantizer]) -> None:
    """Set the ranges of what was observed.

    Raises:
        ModelError: some of it saw nothing; the others have their ranges.
    """
    unseen = []
    for name, quantizer in observed.items():
        if quantizer.observer is None or quantizer.observer.count:
            quantizer.settle()
        else:
            unseen.append(name)
            quantizer.observer = None
    if unseen:
        raise ModelError(
            f"calibration did not reach {', '.join(unseen[:8])}"
            + (f" and {len(unseen) - 8} more" if unseen[8:] else ""),
            rule="a static or learned range is chosen from at least one batch that passes through",
            fix=f"batches that use these layers, or skip={[unseen[0].rpartition('.')[0]]!r}, or range=dynamic",
        )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    # In evaluation mode a normalization that was never trained does nothing: PACT bounds that are chosen so clip a
    # quarter of a fresh ResNet's activations once it trains. Without running statistics torch takes the batch's.
    unused = [(norm, norm.running_mean, norm.running_var) for norm in _unused(model)]
    try:
        model.eval()
        for norm, _, _ in unused:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, mean, variance in unused:
            norm.running_mean, norm.running_var = mean, variance
        for module, mode in modes.items():
            module.training = mode


def _unused(model: nn.Module) -> Iterator[_BatchNorm]:
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.num_batches_tracked is None:
            continue
        if not norm.num_batches_tracked and not norm.running_mean.any():
            yield norm


def _from_data(quantizer: Quantizer) -> bool:
    section = quantizer.section
    if quantizer.for_weight or section.range == "dynamic" or section.bounds is not None:
        return False
    return section.range != "pact" or "pact_alpha" not in section.model_fields_set


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
