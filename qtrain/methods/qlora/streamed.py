"""The frozen base of adapters from its files, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.methods.config import KEPT
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.methods.streamed import RunFiles
from qtrain.models.packed import packed_skeleton
from qtrain.models.quantized.checkpoint import QuantizedCheckpoint
from qtrain.models.quantized.header import quant_method
from qtrain.models.quantized.registry import INTEGERS
from qtrain.models.stored import StoredWeights, stored_directory, stored_weights
from qtrain.modules.frozen_linear import freeze_linear, linears, stored_weight
from qtrain.modules.packed_linear import PackedLinear


def frozen_base(options: QLoraOptions, files: RunFiles) -> tuple[PreTrainedModel, Mapping[str, Tensor]] | None:
    """The base on the meta device, without adapters, and its weights by name, each in the numbers that it stands for;
    None where its layers cannot be had one by one.
    """
    if options.base == "packed" or options.base == KEPT:
        directory = files.packed if options.base == "packed" else stored_directory(files.model)
        if directory is None or quant_method(directory) not in INTEGERS.names():
            return None
        found = packed_skeleton(directory, files.storage, attention=files.model.attention)
        return None if found is None else (found[0], PackedWeights(found[1], found[2], files.device))
    stored = stored_weights(files.model, files.storage)
    if stored is None or options.base == "none":
        return stored
    return stored[0], FrozenWeights(stored[1], stored[0], options, files)


class FrozenWeights(Mapping[str, Tensor]):
    """Linear layers quantized as ``quantize_base`` does it, and back in 16 bits if stored so; the rest as stored."""

    def __init__(self, stored: StoredWeights, model: PreTrainedModel, options: QLoraOptions, files: RunFiles) -> None:
        self._stored, self._options, self._files = stored, options, files
        self._quantized = {f"{name}.weight": linear for name, linear in linears(model)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight = self._stored[name]
        if name not in self._quantized:
            return weight
        shell = self._quantized[name]
        linear = nn.Linear(shell.in_features, shell.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        frozen = freeze_linear(
            linear,
            self._options.base,
            double_quant=self._options.double_quant,
            compute_dtype=self._files.compute,
            device=self._files.device,
        )
        return stored_weight(frozen)


class PackedWeights(Mapping[str, Tensor]):
    """Packed layers in fp32; all else as it is stored."""

    def __init__(self, checkpoint: QuantizedCheckpoint, others: StoredWeights, device: torch.device) -> None:
        self._layers, self._others, self._device = checkpoint.layers, others, device

    def __iter__(self) -> Iterator[str]:
        yield from (f"{name}.weight" for name in self._layers)
        yield from self._others

    def __len__(self) -> int:
        return len(self._layers) + len(self._others)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            return self._others[name]
        return PackedLinear.from_record(layer.load()).to(self._device).dense_weight()
