"""Fake-quantized layers from the files of a run, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.methods.qat.deployed import on_levels, record_of
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.modules.deployed import DeployedTensor
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord


class TrainedLayers:
    """What was saved of a training, beside the base that it began with.

    Args:
        model: prepared, on the meta device.
        trained: weights and ranges.
        base: weights that are not among those: frozen under adapters.
        device: that a layer is computed on.
    """

    def __init__(
        self, model: PreTrainedModel, trained: TensorFiles, base: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._model, self._trained, self._base, self._device = model, trained, base, device
        self._parts = model.state_dict(keep_vars=True)
        # Tied parameters, and quantizers that several layers share, are saved once, under the first of their names.
        places: dict[int, str] = {}
        for name, part in self._parts.items():
            if name in trained:
                places.setdefault(id(part), name)
        self._places = {name: places[id(part)] for name, part in self._parts.items() if id(part) in places}

    @property
    def saved(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what was saved."""
        return {name: tuple(self._trained.shape(name)) for name in self._trained}

    def fill_caches(self) -> None:
        """The quantizers of keys and values, a few numbers each, for good."""
        for name, module in self._model.named_modules():
            if isinstance(module, KVQuantizer):
                module.load_state_dict(self._state(name, module), assign=True)

    def tensors(self, skeleton: Iterable[DeployedTensor]) -> Iterator[DeployedTensor]:
        """The tensors of the model on the meta device, with their numbers."""
        for tensor in skeleton:
            path = tensor.name.rpartition(".")[0]
            module = self._model.get_submodule(path)
            if tensor.name.endswith(".weight") and isinstance(module, QuantLinear | QuantEmbedding):
                record = None if tensor.record is None else partial(self._record, path)
                yield replace(tensor, value=partial(self._value, path), record=record)
            else:
                yield replace(tensor, value=partial(self._get, tensor.name))

    def _value(self, path: str) -> Tensor:
        return on_levels(self._filled(path))

    def _record(self, path: str) -> LinearRecord:
        layer = self._filled(path)
        assert isinstance(layer, QuantLinear)
        return record_of(layer)

    def _filled(self, path: str) -> QuantLinear | QuantEmbedding:
        """A copy of a layer with its numbers, for as long as it is looked at."""
        empty = self._model.get_submodule(path)
        layer = copy.deepcopy(empty)
        layer.load_state_dict(self._state(path, empty), assign=True)
        assert isinstance(layer, QuantLinear | QuantEmbedding)
        return layer

    def _state(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        return {part: self._get(f"{path}.{part}") for part in module.state_dict()}

    def _get(self, name: str) -> Tensor:
        if name in self._places:
            return self._trained.get(self._places[name]).to(self._device)
        return self._base[name].to(self._device, self._parts[name].dtype)
