"""What flows into linear layers while rows of text run: who shares an input, and its sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.errors import DataError
from qtrain.ptq.start import Inputs, Statistic

Hook = Callable[[nn.Module, tuple[Any, ...]], None]
Passes = Iterator[Any]
"""Forward passes, one each time it is advanced."""


def shared_inputs(layers: Mapping[str, nn.Module], passes: Passes) -> list[list[str]]:
    """Names of layers that are called with the very same tensors (q, k and v; gate and up), in order of their calls.

    Rows are run until every layer was called; layers that no row reaches are left out.
    """
    met: dict[str, list[int]] = {}
    present: list[Tensor] = []
    count = 0

    def observe(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Kept until the pass is over, so that no later tensor takes the place of an earlier one in memory.
            if not any(args[0] is tensor for tensor in present):
                present.append(args[0])
            number = next(i for i, tensor in enumerate(present) if args[0] is tensor)
            if args[0].numel():
                met.setdefault(name, []).append(count + number)

        return hook

    with _hooks({name: (layer, observe(name)) for name, layer in layers.items()}):
        for _ in passes:
            count += len(present)
            present.clear()
            if len(met) == len(layers):
                break
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, numbers in met.items():
        groups[tuple(numbers)].append(name)
    return list(groups.values())


def gather_inputs(
    groups: Sequence[Sequence[str]], layers: Mapping[str, nn.Module], passes: Passes, statistic: Statistic
) -> dict[str, Inputs]:
    """Statistics of each group's input over all tokens of all passes, computed once a group.

    Raises:
        DataError: NaN or inf.
    """
    if statistic == "none":
        return {name: Inputs() for group in groups for name in group}
    sums = {group[0]: _Sums(statistic) for group in groups}

    def observe(name: str) -> Hook:
        return lambda module, args: sums[name].add(args[0].detach())

    with _hooks({name: (layers[name], observe(name)) for name in sums}):
        for _ in passes:
            pass
    found = {}
    for group in groups:
        inputs = sums.pop(group[0]).means(group[0])
        found.update(dict.fromkeys(group, inputs))
    return found


def unseen_inputs(width: int, statistic: Statistic, device: torch.device) -> Inputs:
    """What is assumed of an input that no token of the text reached: features of size 1, uncorrelated."""
    if statistic == "none":
        return Inputs()
    ones = torch.ones(width, device=device)
    return Inputs(ones, ones, ones, torch.eye(width, device=device) if statistic == "hessian" else None)


class _Sums:
    """Running sums of an input's statistics, in fp32."""

    def __init__(self, statistic: Statistic) -> None:
        self.whole = statistic == "hessian"
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).to(torch.float32)
        if not len(x):
            return
        if not self.tokens:
            width = x.shape[1]
            self.magnitude, self.largest = x.new_zeros(width), x.new_zeros(width)
            self.product = x.new_zeros(width, width) if self.whole else x.new_zeros(width)
        self.tokens += len(x)
        size = x.abs()
        self.magnitude += size.sum(dim=0)
        torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
        if not self.whole:
            self.product += x.square().sum(dim=0)
            return
        # Under autocast x^T x would be a bf16 product, from which no Cholesky factor comes (seen on SmolLM2).
        with torch.autocast(x.device.type, enabled=False):
            self.product.addmm_(x.t(), x)

    def means(self, name: str) -> Inputs:
        product = self.product.div_(self.tokens)
        if not bool(product.isfinite().all()):
            raise DataError(f"the input of {name!r} holds NaN or inf on the calibration rows")
        moment = product.diagonal().clone() if self.whole else product
        return Inputs(moment, self.largest, self.magnitude.div_(self.tokens), product if self.whole else None)


@contextmanager
def _hooks(hooks: Mapping[str, tuple[nn.Module, Hook]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
