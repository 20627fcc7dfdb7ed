"""Where a scale can move from one operation of a block into the linears that it feeds, found by measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig

from qtrain.modules.blocks import Call
from qtrain.ptq.block_text import BlockText
from qtrain.ptq.inputs import shared_inputs

TOLERANCE = 1e-5
"""Of a proof in float64; blocks round to fp32 inside all the same (norms, softmax)."""
NEAREST = 8
"""Sources that are tried, counted back from the group: it is the third at most in the families tested."""


@dataclass(frozen=True)
class Fold:
    """y = W x is W diag(s) diag(1/s) x: the consumers' columns take s, the rows of the source that gives x give it up.

    Attributes:
        source: a norm (its weight and bias) or a linear (its rows and bias), by full name.
        offset: 1 for a norm that multiplies by 1 + weight (Gemma), else 0.
        consumers: all linears that x flows into, those that stay in 16 bits too.
        channel: [in], which row of the source each feature of x comes from; query heads share those of their kv head.
    """

    source: str
    offset: float
    consumers: tuple[str, ...]
    channel: Tensor

    def apply(self, root: nn.Module, scale: Tensor) -> None:
        """Rewrite source and consumers in place; ``scale`` [rows of the source] is positive."""
        scale = scale.to(torch.float64)  # each number is rounded once, to its own dtype
        scale_rows(root.get_submodule(self.source), 1 / scale, self.offset)
        for name in self.consumers:
            _scale(root.get_parameter(f"{name}.weight"), scale[self.channel])


def find_folds(block: BlockText) -> list[Fold]:
    """A fold for each group of the block's layers that share an input and have one, in order of their calls.

    Nothing is known of the model's code. In a float64 copy of the block, on a few tokens' hidden states, the rows of a
    source are multiplied by numbers that all differ; each feature of x must come back multiplied by exactly one of
    them, which tells where it comes from. Then a random scale is folded in, and the block's outputs must not change:
    another consumer of x, such as a residual or a router, shows there. What is not proven is not folded; nor is a
    parameter that is tied.
    """
    trial = _Trial.of(block)
    found = []
    for group in trial.groups():
        if any(name in block.layers for name in group):
            found += next(([fold] for fold in trial.candidates(group) if trial.unchanged(fold)), [])
    return found


@dataclass(frozen=True)
class _Trial:
    """A float64 copy of the block to experiment on, within a root that knows its modules by their full names."""

    root: nn.Module
    block: nn.Module
    tied: frozenset[str]
    order: list[str]
    hidden: list[Tensor]
    call: Call

    @classmethod
    def of(cls, block: BlockText) -> _Trial:
        own = deepcopy(block.module).to(torch.float64).requires_grad_(False)
        _plain_kernels(own)
        states = block.short_hidden.to(next(own.parameters()).device, torch.float64)
        noise = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(0))
        # Channels that a real text leaves silent speak on noise of three times its size.
        hidden = [states, 3 * states.std() * noise.to(states.device)]
        call = replace(block.short_call, args=_double(block.short_call.args), kwargs=_double(block.short_call.kwargs))
        counts = Counter(id(p) for _, p in block.model.named_parameters(remove_duplicate=False))
        shared = [n for n, p in block.module.named_parameters(remove_duplicate=False) if counts[id(p)] > 1]
        trial = cls(_under(block.name, own), own, frozenset(f"{block.name}.{n}" for n in shared), [], hidden, call)
        return replace(trial, order=trial._order())

    def outputs(self) -> Iterator[Tensor]:
        for hidden in self.hidden:
            yield self.call(self.block, hidden)

    def groups(self) -> list[list[str]]:
        layers = {name: module for name, module in self.root.named_modules() if isinstance(module, nn.Linear)}
        return shared_inputs(layers, self.outputs())

    def candidates(self, group: Sequence[str]) -> Iterator[Fold]:
        """Sources whose rows come back as the features of the group's input; the one called last is tried first."""
        before = self.order[: self.order.index(group[0])]
        for name in reversed(before[-NEAREST:]):
            source = self.root.get_submodule(name)
            for offset in (0.0,) if isinstance(source, nn.Linear) else (0.0, 1.0):
                fold = Fold(name, offset, tuple(group), torch.empty(0))
                if self._free(fold) and (channel := self._channel(fold)) is not None:
                    yield replace(fold, channel=channel)

    def unchanged(self, fold: Fold) -> bool:
        """Whether the block gives what it gave with a random scale folded in."""
        rows = len(self.root.get_parameter(f"{fold.source}.weight"))
        noise = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        scale = torch.exp2(2 * noise - 1).to(self.hidden[0].device)
        before = list(self.outputs())
        fold.apply(self.root, scale)
        after = list(self.outputs())
        fold.apply(self.root, 1 / scale)
        # Against what the block adds: a residual stream may be a thousand times as large.
        return all(
            float((a - b).abs().max()) <= TOLERANCE * float((b - hidden).abs().max())
            for a, b, hidden in zip(after, before, self.hidden, strict=True)
        )

    def _free(self, fold: Fold) -> bool:
        """Whether shapes agree and no parameter is tied."""
        rows = len(self.root.get_parameter(f"{fold.source}.weight"))
        width = self.root.get_parameter(f"{fold.consumers[0]}.weight").shape[1]
        several = isinstance(self.root.get_submodule(fold.source), nn.Linear)  # query heads may share a row of v
        touched = {f"{name}.{part}" for name in (fold.source, *fold.consumers) for part in ("weight", "bias")}
        return (width % rows == 0 if several else width == rows) and not touched & self.tied

    def _channel(self, fold: Fold) -> Tensor | None:
        source = self.root.get_submodule(fold.source)
        rows = len(self.root.get_parameter(f"{fold.source}.weight"))
        own = torch.arange(rows, device=self.hidden[0].device)
        ramp = 1 + (own + 1).to(torch.float64) / rows
        before = self._input(fold.consumers[0])
        scale_rows(source, ramp, fold.offset)
        after = self._input(fold.consumers[0])
        scale_rows(source, 1 / ramp, fold.offset)
        if before.shape != after.shape or not len(before):
            return None  # a router sent other tokens
        size = before.abs().amax(dim=0)
        ratio = (after * before).sum(dim=0) / before.square().sum(dim=0)
        place = (ratio - 1) * rows - 1
        channel = place.round()
        proven = ((place - channel).abs() < 0.05) & (channel >= 0) & (channel < rows)
        proven &= (after - ratio * before).abs().amax(dim=0) <= TOLERANCE * size
        silent = (size == 0) & (after == 0).all(dim=0)
        if bool(silent.any()) and len(silent) == rows and bool((channel == own)[~silent].all()):
            # Where all others come from the row of their own number, so do those of which no token tells.
            channel, proven = own, proven | silent
        whole = bool(proven.all()) and len(channel.unique()) == rows
        return channel.long() if whole else None

    def _input(self, name: str) -> Tensor:
        """What flows into a layer [tokens, in]."""
        kept: list[Tensor] = []
        handle = self.root.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            for _ in self.outputs():
                pass
        finally:
            handle.remove()
        return torch.cat([x.flatten(0, -2) for x in kept]) if kept else torch.empty(0)

    def _order(self) -> list[str]:
        """Linears, and modules that hold a vector called weight, in order of their (first) calls."""
        called: dict[str, None] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: called.setdefault(name))
            for name, module in self.root.named_modules()
            if isinstance(module, nn.Linear) or _is_vector(getattr(module, "weight", None))
        ]
        try:
            for _ in self.outputs():
                pass
        finally:
            for handle in handles:
                handle.remove()
        return list(called)


def scale_rows(module: nn.Module, factor: Tensor, offset: float) -> None:
    """What the module gives, times ``factor`` [rows]."""
    weight = module.get_parameter("weight")
    _scale(weight, factor.unsqueeze(1) if weight.ndim == 2 else factor, offset)
    if getattr(module, "bias", None) is not None:
        _scale(module.get_parameter("bias"), factor)


@torch.no_grad()
def _scale(parameter: Tensor, factor: Tensor, offset: float = 0.0) -> None:
    parameter.copy_((parameter.to(torch.float64) + offset) * factor - offset)


def _plain_kernels(module: nn.Module) -> None:
    """Kernels that take float64 in the place of those for 16 bits alone (flash attention, grouped products)."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if isinstance(config, PretrainedConfig):
            config._experts_implementation_internal = "eager"
            if "flash" in str(config._attn_implementation):
                config._attn_implementation_internal = "sdpa"


def _double(arguments: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)


def _is_vector(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def _under(name: str, module: nn.Module) -> nn.Module:
    """A root in which ``module`` has this full name."""
    for part in reversed(name.split(".")):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module
