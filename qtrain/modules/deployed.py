"""What an export writes: the tensors of the plain architecture, computed one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PretrainedConfig

from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams
from qtrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class DeployedTensor:
    """One tensor of the checkpoint to be.

    Attributes:
        name: its key in a plain checkpoint: ``model.layers.0.mlp.up_proj.weight``.
        shape: of the value, known before it is computed.
        linear: a weight [out, in] of a linear layer that a format may quantize; lm_head is none.
        value: computes it (merged in fp32, or as stored); nothing is held before the call or after it.
        rows: where a value is computed row by row: begins, and gives what computes some of its rows, in any thread.
        spec: of the codes it was trained with, where there are any; no format may decide others.
        record: computes those.
        activation: what the layer's input was quantized to in training.
        whole_zero_points: False where the record's zero points are numbers of any value.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool
    value: Callable[[], torch.Tensor]
    rows: Callable[[], Callable[[slice], torch.Tensor]] | None = None
    spec: QuantSpec | None = None
    record: Callable[[], LinearRecord] | None = None
    activation: QuantSpec | None = None
    whole_zero_points: bool = True


@dataclass(frozen=True)
class DeployedCache:
    """Ranges of keys and values that were kept in training, and so have to be in a file.

    Attributes:
        section: what keys and values were trained as.
        ranges: of keys and of values, scale [1, 1] and zero point, by the attention module's name.
        note: of ``DeployedModel.notes``, that they are in no file; it does not hold in a format that has a place.
    """

    section: KVCacheSection
    ranges: Mapping[str, tuple[QParams, QParams]]
    note: str


@dataclass(frozen=True)
class DeployedModel:
    """The trained model as a plain checkpoint, whatever it was trained as.

    Attributes:
        config: of the plain architecture.
        generation_config: written beside it, if there is one.
        tensors: a fresh iterator in checkpoint order; a tied lm_head is left out.
        dtype: of the tensors that stay unquantized.
        trained_codes: formats write the codes of the training, or refuse; they quantize nothing themselves.
        notes: what who runs the checkpoint must know and cannot read from it.
        adapted: the live model with its adapters, for formats that keep those apart from the base; None without any.
        cache: ranges of keys and values, where they are kept.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    tensors: Callable[[], Iterator[DeployedTensor]]
    dtype: torch.dtype
    trained_codes: bool = False
    notes: tuple[str, ...] = ()
    adapted: PeftModel | None = None
    cache: DeployedCache | None = None
