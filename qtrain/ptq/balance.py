"""Starts that rewrite a block, its function unchanged, before its layers are quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.block_text import BlockText
from qtrain.ptq.folds import find_folds
from qtrain.ptq.start import Inputs, Statistic


class Balancing(ABC):
    """What a start is as well that moves scales between operations: W x = (W diag s) (diag(1/s) x)."""

    looks_at: ClassVar[Statistic]
    """What ``scale`` wants to know of the inputs; ``Start.statistic`` is for what comes after."""

    def balance(self, block: BlockText, specs: Mapping[str, QuantSpec]) -> None:
        """Rewrite the block in place, wherever a scale can move (``folds``); its function is unchanged."""
        folds = find_folds(block)
        if not folds:
            return
        inputs = block.inputs([fold.consumers for fold in folds], self.looks_at)
        for fold in folds:
            # Linears that stay in 16 bits take the scale along, but have no say in it.
            layers = block.linears([name for name in fold.consumers if name in specs])
            weights = [(layer.weight.detach(), specs[name]) for name, layer in layers.items()]
            fold.apply(block.model, self.scale(weights, inputs[fold.consumers[0]], fold.channel))

    @abstractmethod
    def scale(self, weights: list[tuple[Tensor, QuantSpec]], inputs: Inputs, channel: Tensor) -> Tensor:
        """s, fp32, for each channel of the source.

        Args:
            weights: [out, in] that share the input, and what each will become.
            channel: [in], the channel of the source that each feature of the input comes from.
        """


def largest_by_channel(values: Tensor, channel: Tensor) -> Tensor:
    """The largest of the not negative ``values`` [in] that belong to each channel."""
    found = values.new_zeros(int(channel.max()) + 1)
    return found.scatter_reduce(0, channel.to(values.device), values, "amax")
