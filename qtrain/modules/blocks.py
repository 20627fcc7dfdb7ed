"""A decoder's blocks, and the arguments that the decoder calls them with, found by watching it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from qtrain.errors import ModelError

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """How the decoder calls one block, less the hidden states: rotary angles, mask, and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output [B, L, d] for other hidden states [B, L, d]."""
        if self.positional:
            return states(block(hidden, *self.args, **self.kwargs))
        return states(block(*self.args, **{HIDDEN: hidden}, **self.kwargs))

    def same(self, other: Call) -> bool:
        """Whether the two calls differ in nothing but the hidden states."""
        (leaves, structure), (others, other_structure) = (tree_flatten((c.args, c.kwargs)) for c in (self, other))
        return structure == other_structure and all(map(_equal, leaves, others))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and content of the longest ModuleList of the decoder; lists inside of lists (experts) do not count.

    Raises:
        ModelError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks",
            rule="what goes block by block takes the blocks of model.get_decoder(), held in an nn.ModuleList",
        )
    name = max(found, key=lambda key: len(found[key]))
    return name, found[name]


def watch(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """Run ids [B, L] through the decoder: what enters the first block [B, L, d], and how each block is called.

    Raises:
        ModelError: the blocks are not called one after the other, each on the output of the one before.
    """
    entered: list[tuple[nn.Module, Tensor, Call]] = []
    left: list[Tensor] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((block, *_entry(block, args, kwargs)))

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        left.append(states(output))

    with _hooks(blocks, enter, leave), torch.no_grad():
        model.get_decoder()(input_ids=ids, use_cache=False)
    in_order = [block for block, _, _ in entered] == list(blocks)
    if not in_order or any(hidden is not before for (_, hidden, _), before in zip(entered[1:], left, strict=False)):
        raise ModelError(
            f"{type(model).__name__} does not call its blocks one after the other",
            rule="what goes block by block needs each to take the output of the one before",
        )
    return entered[0][1], [call for _, _, call in entered]


def entering(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, Call]:
    """What enters the first block [B, L, d] for ids [B, L], and how it is called; no block is run."""
    seen: list[tuple[Tensor, Call]] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_entry(block, args, kwargs))
        raise _Entered

    handle = blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Entered):
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def states(output: Any) -> Tensor:
    """The hidden states of a block's output, which may be a tuple that begins with them."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


class _Entered(Exception):
    """The first block was reached."""


def _entry(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    positional = bool(args)
    others = {name: value for name, value in kwargs.items() if name != HIDDEN}
    hidden = args[0] if positional else kwargs.get(HIDDEN)
    assert isinstance(hidden, Tensor), f"{type(block).__name__} is not called with {HIDDEN}"
    return hidden, Call(args[1:], others, positional)


@contextmanager
def _hooks(blocks: nn.ModuleList, enter: Any, leave: Any) -> Iterator[None]:
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
