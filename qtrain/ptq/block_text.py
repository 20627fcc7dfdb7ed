"""A decoder block with the hidden states that enter it on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.modules.blocks import Call, watch
from qtrain.ptq.inputs import gather_inputs, shared_inputs
from qtrain.ptq.start import Inputs, Statistic

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class BlockText:
    """What a start may look at while one block is quantized.

    Attributes:
        module: the block.
        layers: its linears that will be quantized, by their full names; looked up anew each time, for they are
            replaced one by one.
        hidden: states [b, L, d] that enter the block, for each row of text.
        calls: how the decoder calls it, for each row.
        context: what forward passes run in.
    """

    model: PreTrainedModel
    module: nn.Module
    layers: Sequence[str]
    hidden: Sequence[Tensor]
    calls: Sequence[Call]
    context: Context

    def linears(self, names: Collection[str]) -> dict[str, nn.Linear]:
        """The modules that have these names at the moment."""
        found = {name: self.model.get_submodule(name) for name in names}
        return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}

    def outputs(self) -> Iterator[Tensor]:
        """What the block gives for each row [b, L, d], as it is at the moment."""
        device = next(self.module.parameters()).device
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


def enter(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: Iterator[Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """For each row of ids [b, L] what enters the first block [b, L, d], on the CPU, and how all blocks are called.

    Rows with the same calls share them in memory: rotary angles and masks depend on the shape alone, most often.
    """
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    known: dict[torch.Size, list[Call]] = {}
    for row in ids:
        states, own = watch(model, blocks, row.to(device))
        kept = known.setdefault(row.shape, own)
        hidden.append(states.cpu())
        calls.append(kept if all(map(Call.same, own, kept)) else own)
    return hidden, calls
