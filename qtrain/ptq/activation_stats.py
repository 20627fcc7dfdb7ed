"""What flows into each linear layer on real text: the weights of a scale search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import DataError, ModelError
from qtrain.registry import did_you_mean


def input_second_moments(model: nn.Module, rows: Iterable[Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """E[x_j^2] of the input x [tokens, in] of each named module, over all tokens of all rows.

    Any module that takes its input as first argument is observed, a PEFT layer around a 4-bit linear included. One
    fp32 vector [in] a module is held.

    Args:
        rows: token ids [batch, tokens], without padding.
        names: of modules of ``model``, as ``named_modules`` spells them.

    Raises:
        ModelError: a name that the model does not have.
        DataError: no rows, or inputs that are not finite.
    """
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).to(torch.float32)
            square = x.square().sum(dim=0)
            sums[name] = sums[name] + square if name in sums else square
            tokens[name] = tokens.get(name, 0) + x.shape[0]

        return hook

    handles = []
    try:
        for name in names:
            if name not in modules:
                raise ModelError(f"there is no module {name!r} to calibrate", fix=did_you_mean(name, modules))
            handles.append(modules[name].register_forward_pre_hook(observe(name)))
        with inference(model):
            device = next(model.parameters()).device
            for ids in rows:
                model(input_ids=ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not tokens.get(name):
            raise DataError(f"no calibration token reached {name!r}", rule="calibration needs at least one row of text")
        if not bool(sums[name].isfinite().all()):
            raise DataError(f"the input of {name!r} holds NaN or inf on the calibration rows")
    return {name: sums[name] / tokens[name] for name in names}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; the mode that the model was in comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
