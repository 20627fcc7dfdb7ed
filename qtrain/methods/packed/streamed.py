"""Packed layers from the files of a run, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qtrain.models.packed import input_quantizer
from qtrain.models.quantized.checkpoint import QuantizedCheckpoint
from qtrain.models.stored import StoredWeights
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.modules.scales import SCALE, ZERO_POINT, Scales


@dataclass(frozen=True)
class StoredLayers:
    """A packed base, and the task that was trained over it.

    Attributes:
        checkpoint: reads codes and ranges.
        others: reads everything else.
        scales: of the task; None: those of the base.
        device: that a layer is computed on.
    """

    checkpoint: QuantizedCheckpoint
    others: StoredWeights
    scales: Scales | None
    device: torch.device

    def tensors(self, skeleton: Iterable[DeployedTensor]) -> Iterator[DeployedTensor]:
        """The tensors of a model on the meta device, with their numbers."""
        for tensor in skeleton:
            name = tensor.name.removesuffix(".weight")
            if name == tensor.name or name not in self.checkpoint.layers:
                yield replace(tensor, value=partial(self.others.__getitem__, tensor.name))
            else:
                record = None if tensor.record is None else partial(self._record, name)
                yield replace(tensor, value=partial(self._dense, name), record=record)

    @torch.no_grad()
    def _record(self, name: str) -> LinearRecord:
        layer = self.checkpoint.layers[name]
        found = layer.load()
        scheme = layer.inputs
        inputs = None if scheme is None or scheme.qparams is None else input_quantizer(scheme).stored()
        if self.scales is None:
            return replace(found, inputs=inputs)
        points = self.scales.tensors.get(name + ZERO_POINT, found.zero_point)
        return replace(found, scale=self.scales.tensors[name + SCALE], zero_point=points, inputs=inputs)

    @torch.no_grad()
    def _dense(self, name: str) -> Tensor:
        layer = PackedLinear.from_record(self.checkpoint.layers[name].load())
        if self.scales is not None:
            layer.set_ranges(self.scales.tensors[name + SCALE], self.scales.tensors.get(name + ZERO_POINT))
        return layer.to(self.device).dense_weight()
