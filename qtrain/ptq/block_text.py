"""Calibration text inside of the decoder: the hidden states that enter a block, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import DataError
from qtrain.modules.blocks import Call, decoder_blocks, entering, watch
from qtrain.ptq.inputs import gather_inputs, shared_inputs
from qtrain.ptq.start import Inputs, Statistic

Context = Callable[[], AbstractContextManager[Any]]
Progress = Callable[[Iterator[Any], int], Iterator[Any]]
SHORT = 32
"""Tokens on which experiments are made: each channel needs a few."""


@dataclass(frozen=True)
class BlockText:
    """What a start may look at while one block is quantized.

    Attributes:
        name: of the block, in full.
        module: the block.
        layers: its linears that will be quantized, by their full names; looked up anew each time, for they are
            replaced one by one.
        hidden: states [b, L, d] that enter the block, for each row of text.
        calls: how the decoder calls it, for each row.
        short_hidden, short_call: a beginning of the first row [1, l, d], for experiments.
        context: what forward passes run in.
    """

    model: PreTrainedModel
    name: str
    module: nn.Module
    layers: Sequence[str]
    hidden: Sequence[Tensor]
    calls: Sequence[Call]
    short_hidden: Tensor
    short_call: Call
    context: Context

    def linears(self, names: Collection[str]) -> dict[str, nn.Linear]:
        """The modules that have these names at the moment."""
        found = {name: self.model.get_submodule(name) for name in names}
        return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}

    def outputs(self) -> Iterator[Tensor]:
        """What the block gives for each row [b, L, d], as it is at the moment."""
        # A block whose layers are packed may have no parameter left.
        device = next(chain(self.module.parameters(), self.module.buffers())).device
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            # Not around the yield: whoever advances this would run in the context too.
            with self.context(), torch.no_grad():
                output = call(self.module, hidden.to(device))
            yield output

    def groups(self) -> list[list[str]]:
        """The layers that share an input, in order of their calls, less those that no token reaches."""
        return shared_inputs(self.linears(self.layers), self.outputs())

    def inputs(self, groups: Sequence[Sequence[str]], statistic: Statistic) -> dict[str, Inputs]:
        """Statistics of what flows into the layers of these groups at the moment.

        Raises:
            DataError: NaN or inf.
        """
        return gather_inputs(groups, self.linears([group[0] for group in groups]), self.outputs(), statistic)


@dataclass(frozen=True)
class DecoderText:
    """The hidden states on their way through the decoder, at the entrance of one block after the other.

    Attributes:
        prefix: full name of the list of blocks.
        hidden: [b, L, d] of each row, on the CPU.
        calls: of each row, how the decoder calls each block.
        short_calls: the same for the first tokens of the first row.
    """

    model: PreTrainedModel
    prefix: str
    blocks: nn.ModuleList
    hidden: list[Tensor]
    calls: list[list[Call]]
    short_calls: list[Call]
    context: Context

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Sequence[Tensor], context: Context, progress: Progress) -> DecoderText:
        """What enters the first block for each row of ids [b, L].

        Rows with the same calls share them in memory: rotary angles and masks depend on the shape alone, most often.

        Raises:
            ModelError: blocks that are no chain.
        """
        _, blocks = decoder_blocks(model)
        prefix = next(name for name, module in model.named_modules() if module is blocks)
        device = next(model.parameters()).device
        hidden, calls = [], []
        known: dict[torch.Size, list[Call]] = {}
        sure: set[torch.Size] = set()
        with context():
            for ids in progress(iter(rows), len(rows)):
                shared = known.get(ids.shape)
                if ids.shape in sure and shared is not None:
                    states, first = entering(model, blocks, ids.to(device))
                    if first.same(shared[0]):
                        hidden.append(states.cpu())
                        calls.append(shared)
                        continue
                states, own = watch(model, blocks, ids.to(device))
                shared = known.setdefault(ids.shape, own)
                hidden.append(states.cpu())
                same = all(map(Call.same, own, shared))
                calls.append(shared if same else own)
                if same and own is not shared:
                    sure.add(ids.shape)  # two rows agree on all blocks: of the others the first block tells enough
            _, short_calls = watch(model, blocks, rows[0][:1, :SHORT].to(device))
        return cls(model, prefix, blocks, hidden, calls, short_calls, context)

    def at(self, k: int, layers: Sequence[str]) -> BlockText:
        """Block k, whose ``layers`` will be quantized, with what enters it."""
        calls, short = [own[k] for own in self.calls], self.hidden[0][:1, :SHORT]
        name = f"{self.prefix}.{k}"
        return BlockText(
            self.model, name, self.blocks[k], layers, self.hidden, calls, short, self.short_calls[k], self.context
        )

    def leave(self, block: BlockText) -> None:
        """What the block gives now is what enters the next one.

        Raises:
            DataError: NaN or inf.
        """
        for i, output in enumerate(block.outputs()):
            if not bool(output.isfinite().all()):
                raise DataError(f"the output of {block.name!r} holds NaN or inf on row {i} of the calibration text")
            self.hidden[i] = output.cpu()
