"""One block's weights, scales and zero points learn to give what the full-precision block gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.modules.block_chain import Chain, row_order
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.block_start import record_of, start_records, trainable_copy
from qtrain.ptq.config import BlockApSection

FLOOR = 0.05
"""Share of the learning rate that the cosine ends at."""


@dataclass(frozen=True)
class Split:
    """Numbers of the rows that blocks train on, and of those that their errors are measured on."""

    trained: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, rows: int, share: float, seed: int) -> Split:
        """``share`` of the rows held out, one at least; all rows for both where the share is 0 or there is one row."""
        if share == 0 or rows == 1:
            return cls(torch.arange(rows), torch.arange(rows))
        count = min(max(1, round(share * rows)), rows - 1)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        return cls(order[count:].sort().values, order[:count].sort().values)


@dataclass(frozen=True)
class TrainedBlock:
    """Records by the layers' names within the block, and its error on the rows held out: at the start, and theirs."""

    records: dict[str, LinearRecord]
    before: float
    after: float


class BlockTraining:
    """Trains copies of a chain's blocks; the blocks themselves stay as they are.

    Args:
        options: epochs and learning rates.
        seed: of the rows held out and of the order of the others.

    Attributes:
        steps: of an epoch.
    """

    def __init__(self, chain: Chain, options: BlockApSection, seed: int) -> None:
        self.chain, self.options, self.seed = chain, options, seed
        self.split = Split.of(len(chain.rows), options.validation, seed)
        self.steps = -(-len(self.split.trained) // chain.size)

    def train(
        self, k: int, specs: Mapping[str, QuantSpec], inputs: Tensor, target: Tensor, ticks: Iterator[Any]
    ) -> TrainedBlock:
        """Minimise mean (B_q(inputs) - target)^2; what the best epoch left is kept, or the start.

        Args:
            specs: of the block's linears, by their names within it.
            inputs: what enters the block [rows, L, d]. target: what should leave it.
            ticks: advanced once for each step.
        """
        held = self.split.held_out
        start = start_records(self.options.start, self.chain, k, specs, inputs, self.split.trained)
        block = trainable_copy(self.chain.blocks[k], start)
        before = least = self.chain.error(k, inputs, target, block, held)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        best = [parameter.detach().clone() for parameter in trained]
        for _ in self._epochs(k, block, specs, inputs, target, before, ticks):
            error = self.chain.error(k, inputs, target, block, held)
            if error < least:
                least, best = error, [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            for parameter, value in zip(trained, best, strict=True):
                parameter.copy_(value)
        return TrainedBlock({name: record_of(block.get_submodule(name)) for name in specs}, before, least)

    def _epochs(
        self,
        k: int,
        block: nn.Module,
        specs: Mapping[str, QuantSpec],
        inputs: Tensor,
        target: Tensor,
        unit: float,
        ticks: Iterator[Any],
    ) -> Iterator[int]:
        """Train for one epoch after the other."""
        if not specs:
            return
        total = self.options.epochs * self.steps
        optimizer = torch.optim.Adam(self._groups(block, specs))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / total))
        order = self.split.trained[row_order(len(self.split.trained), total * self.chain.size, self.seed + k)]
        for epoch, rows_of_epoch in enumerate(order.split(self.steps * self.chain.size)):
            for rows, _ in zip(rows_of_epoch.split(self.chain.size), ticks, strict=False):
                optimizer.zero_grad()
                self.chain.loss(k, inputs[rows], target[rows], unit, block).backward()
                optimizer.step()
                schedule.step()
            optimizer.zero_grad()
            yield epoch

    def _groups(self, block: nn.Module, specs: Mapping[str, QuantSpec]) -> list[dict[str, Any]]:
        """Weights at their own rate, by bits where none was asked for; scales and zero points at theirs."""
        groups: list[dict[str, Any]] = []
        for name, spec in specs.items():
            layer = block.get_submodule(name)
            assert isinstance(layer, QuantLinear) and layer.weight_quantizer is not None
            weight_lr = self.options.weight_lr or (2e-5 if spec.bits == 2 else 1e-5)
            groups.append({"params": [layer.weight], "lr": weight_lr})
            groups.append({"params": list(layer.weight_quantizer.parameters()), "lr": self.options.range_lr})
        return groups


def _cosine(done: float) -> float:
    """From 1 to FLOOR."""
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2
