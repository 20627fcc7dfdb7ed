"""What flows into each linear layer on real text: the weights of a scale search, the Hessians of GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qtrain.errors import DataError, ModelError
from qtrain.registry import did_you_mean

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Calibration:
    """The live model, and rows of text to run through it.

    Attributes:
        model: whose modules are named as in the checkpoint; any layer that takes its input as first argument is
            observed, a PEFT layer around a 4-bit linear included.
        rows: token ids [batch, tokens], without padding; read once a pass.
        context: what the forward passes run in, such as the autocast of the training.
    """

    model: nn.Module
    rows: Sequence[Tensor]
    context: Context = nullcontext

    def second_moments(self, names: Collection[str]) -> dict[str, Tensor]:
        """E[x_j^2] [in], fp32, of the input of each named module over all tokens."""
        return _means(self.model, self.rows, names, squares, self.context)

    def hessians(self, names: Sequence[str], memory: int = 2 * 2**30) -> Iterator[tuple[str, Tensor]]:
        """Each name with E[x x^T] [in, in], fp32, of its module's input, in the order of ``names``.

        Args:
            memory: bytes of Hessians to hold at a time; what does not fit is left to another pass over the rows.
        """
        while names:
            taken, size = 0, 0
            while taken < len(names):
                size += 4 * _module(self.model, names[taken]).in_features ** 2
                if taken and size > memory:
                    break
                taken += 1
            held = _means(self.model, self.rows, names[:taken], lambda x: x.t() @ x, self.context)
            for name in names[:taken]:
                yield name, held.pop(name)
            names = names[taken:]


def input_second_moments(model: nn.Module, rows: Iterable[Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """E[x_j^2] of the input x [tokens, in] of each named module, over all tokens of all rows; fp32 [in].

    Raises:
        ModelError: a name that the model does not have.
        DataError: no rows, or inputs that are not finite.
    """
    return _means(model, rows, names, squares)


def squares(x: Tensor) -> Tensor:
    """Summed x_j^2 [in] of x [tokens, in]."""
    return x.square().sum(dim=0)


def _means(
    model: nn.Module,
    rows: Iterable[Tensor],
    names: Collection[str],
    statistic: Callable[[Tensor], Tensor],
    context: Context = nullcontext,
) -> dict[str, Tensor]:
    """``statistic`` of each module's input x [tokens, in], summed over the rows, over the number of tokens."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    latest: list[tuple[Tensor, Tensor]] = []

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            # q, k and v are called with one tensor, gate and up too: its statistic is computed once.
            if not (latest and latest[0][0] is inputs[0]):
                # Under autocast x^T x would be a bf16 product, from which no Cholesky factor comes (seen on SmolLM2).
                with torch.autocast(x.device.type, enabled=False):
                    latest[:] = [(inputs[0], statistic(x.flatten(0, -2).to(torch.float32)))]
            value = latest[0][1]
            sums[name] = sums[name].add_(value) if name in sums else value.clone()
            tokens[name] = tokens.get(name, 0) + x.numel() // x.shape[-1]

        return hook

    handles = []
    try:
        for name in names:
            handles.append(_module(model, name).register_forward_pre_hook(observe(name)))
        with inference(model), context():
            # The decoder alone where no head is asked for: logits of 4 x 512 tokens over 49k words would be 0.4 GB and
            # a fifth of the time.
            decoder = getattr(model, "base_model", model)
            inside = set(decoder.modules())
            run = decoder if all(_module(model, name) in inside for name in names) else model
            device = next(model.parameters()).device
            for ids in rows:
                run(input_ids=ids.to(device), use_cache=False)
                latest.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not tokens.get(name):
            raise DataError(f"no calibration token reached {name!r}", rule="calibration needs at least one row of text")
        if not bool(sums[name].isfinite().all()):
            raise DataError(f"the input of {name!r} holds NaN or inf on the calibration rows")
    return {name: sums[name].div_(tokens[name]) for name in names}


def _module(model: nn.Module, name: str) -> Any:
    modules = dict(model.named_modules())
    if name not in modules:
        raise ModelError(f"there is no module {name!r} to calibrate", fix=did_you_mean(name, modules))
    return modules[name]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no TF32 in sums of squares; what was set before comes back, module by module.

    A module that came into the model meanwhile gets the model's mode.
    """
    training = model.training
    # What is replaced meanwhile must leave the memory: layers hold their 16-bit weights.
    modes = WeakKeyDictionary({module: module.training for module in model.modules()})
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module in model.modules():
            module.training = modes.get(module, training)
