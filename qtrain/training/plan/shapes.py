"""The model that a run would train, in shapes: prepared by its method on the meta device, no weight loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qtrain.errors import ModelError
from qtrain.methods.config import KEPT, MethodSection
from qtrain.methods.method import Method, build_method
from qtrain.methods.packed.config import PackedKeys
from qtrain.methods.packed.pack import layers_to_pack
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.models.config import ModelSection
from qtrain.models.load import unreadable
from qtrain.models.packed import packed_skeleton
from qtrain.models.quantized.skeleton import empty_model, plain_config
from qtrain.models.source import find_model
from qtrain.models.stored import stored_directory
from qtrain.modules.frozen_shapes import freeze_shapes, packed_shape
from qtrain.modules.quantizer import Quantizer
from qtrain.training.live_bytes import place, tensor_bytes

META = torch.device("meta")


@dataclass(frozen=True)
class Shapes:
    """A prepared model on the meta device.

    Attributes:
        model: as the method wraps it.
        plain: the transformers model inside.
        method: that prepared it.
    """

    model: nn.Module
    plain: PreTrainedModel
    method: Method[Any]

    @property
    def trained(self) -> list[nn.Parameter]:
        """What has gradients and optimizer state."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def base_bytes(self) -> int:
        """Of all that does not train, as it is stored: codes with their scales, embeddings, norms, buffers."""
        trained = {place(p) for p in self.trained}
        return tensor_bytes(tensor for tensor in held(self.model) if place(tensor) not in trained)


def prepared_shapes(model: ModelSection, method: MethodSection, storage: torch.dtype, compute: torch.dtype) -> Shapes:
    """The whole depth, each layer as its options have it.

    The method itself prepares the model, so that what it stores and what trains is what a run has; it is handed a
    base that is quantized already, as those of checkpoints are, for how codes are chosen changes no shape.

    Raises:
        ModelError: no config, or codes in a layout whose shapes are known only when they are read.
    """
    base = skeleton(model, method, storage)
    if not method.keeps_codes:
        method = quantized(base, method, compute)
    prepared = build_method(method)
    built = prepared.prepare(base, compute_dtype=compute, device=META, restoring=True).train()
    return Shapes(built, prepared.plain_model(built), prepared)


def skeleton(model: ModelSection, method: MethodSection, storage: torch.dtype) -> PreTrainedModel:
    """The architecture of ``model.path`` on the meta device, packed where ``method`` keeps its codes.

    Raises:
        ModelError: it cannot be told from config.json, or a GGUF file's header.
    """
    if method.keeps_codes:
        directory = stored_directory(model)
        found = None if directory is None else packed_skeleton(directory, storage, attention=model.attention)
        if found is None:
            raise ModelError("the shapes of these codes are known only when they are read")
        return found[0]
    built = empty_model(_config(model), storage, model.attention)
    built.tie_weights()
    return built


def quantized(model: PreTrainedModel, method: MethodSection, compute: torch.dtype) -> MethodSection:
    """Give ``model`` the frozen base that ``method`` would make of it; the method that leaves it so."""
    if isinstance(method, QLoraOptions) and method.packed is None:
        if method.base == "none":
            return method
        freeze_shapes(model, method.base, double_quant=method.double_quant, compute_dtype=compute)
        return method.model_copy(update={"base": KEPT})
    keys = method.packed if isinstance(method, QLoraOptions) else method
    if not isinstance(keys, PackedKeys):
        return method
    for name, asked in layers_to_pack(model, keys).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and asked["weight"] is not None
        packed = packed_shape(linear, asked["weight"].spec(weight=True))
        if asked["activation"] is not None:
            packed.input_quantizer = Quantizer(asked["activation"])
        model.set_submodule(name, packed)
    return method.model_copy(update={"base": KEPT, "packed": None}) if isinstance(method, QLoraOptions) else method


def _config(section: ModelSection) -> PretrainedConfig:
    source = find_model(section)
    if source.kind == "directory":
        return plain_config(Path(source.location))
    if section.trust_remote_code:
        raise ModelError("which shapes it has, the code that comes with the model knows")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            **source.loader_arguments, revision=section.revision or "main", trust_remote_code=False
        )
    except Exception as error:  # which code reads it is in the file itself: it raises anything
        raise unreadable("config", source, error) from None
    return config


def held(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model holds, those of bitsandbytes' states too, which are no parameters."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(state, QuantState):
            found += state_tensors(state)
        if isinstance(module, Linear8bitLt):
            found += [part for part in (module.state.CB, module.state.SCB) if part is not None]
    return found


def state_tensors(state: QuantState) -> list[Tensor]:
    """Scales, code and offset, of both levels."""
    own = [part for part in (state.absmax, state.code, state.offset) if part is not None]
    return own + (state_tensors(state.state2) if state.nested else [])
