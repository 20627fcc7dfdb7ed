"""Which tensor of the file has which type, decided before any weight is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType, LlamaFileType, TensorNameMap, get_tensor_name_map

from qtrain.errors import ExportError
from qtrain.export.gguf.architecture import architecture_of, tensor_name
from qtrain.export.gguf.blocks import minimum_is_exact
from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.trained import (
    BLOCK_TYPES,
    RULE,
    BlockType,
    block_type,
    may_have_minimum,
    nearest_type,
)
from qtrain.modules.deployed import DeployedModel, DeployedTensor

FLOATS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
FILE_TYPES = {"F32": LlamaFileType.ALL_F32} | {
    name: LlamaFileType[f"MOSTLY_{name}"] for name in ("F16", "BF16", *BLOCK_TYPES)
}


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the file.

    Attributes:
        tensor: what it holds.
        name: in the file.
        type: of ggml's.
        blocks: the block type where it is one.
        lossy: no type holds its trained levels; this is the nearest.
    """

    tensor: DeployedTensor
    name: str
    type: GGMLQuantizationType
    blocks: BlockType | None = None
    lossy: bool = False


def plan_tensors(model: DeployedModel, options: GgufOptions) -> list[PlacedTensor]:
    """All tensors of the file, in its order.

    Raises:
        ExportError: a trained layer that no type holds as it is, unless ``options.allow_requantize``.
    """
    names = get_tensor_name_map(architecture_of(model.config).arch, model.config.num_hidden_layers)
    tensors = list(model.tensors())
    if model.trained_codes:
        options.check_trained((tensor.name, tensor.spec, tensor.activation) for tensor in tensors if tensor.linear)
    return [_placed(tensor, names, model, options) for tensor in tensors]


def file_type(plan: Iterable[PlacedTensor]) -> LlamaFileType:
    """The commonest type of linear layers, by which the file is labelled."""
    counts = Counter(placed.type.name for placed in plan if placed.tensor.linear)
    return FILE_TYPES[counts.most_common(1)[0][0]]


def _placed(tensor: DeployedTensor, names: TensorNameMap, model: DeployedModel, options: GgufOptions) -> PlacedTensor:
    name = tensor_name(names, tensor.name)
    blocks, lossy = _blocks(tensor, model, options) if tensor.linear else (None, False)
    if blocks is not None:
        return PlacedTensor(tensor, name, GGMLQuantizationType[blocks.name], blocks, lossy)
    # llama.cpp computes with norms and biases in fp32 alone.
    dtype = model.dtype if len(tensor.shape) > 1 else torch.float32
    return PlacedTensor(tensor, name, FLOATS[dtype], lossy=lossy)


def _blocks(tensor: DeployedTensor, model: DeployedModel, options: GgufOptions) -> tuple[BlockType | None, bool]:
    """The block type, and whether it is a lossy one; None for a layer that stays unquantized."""
    width, spec = tensor.shape[1], tensor.spec
    if not model.trained_codes:
        kind = BLOCK_TYPES.get(options.quantize.upper())
        return (None if kind is None or width % kind.size else kind), False
    if spec is None or tensor.record is None:
        return None, False
    if tensor.whole_zero_points:
        if may_have_minimum(spec) and minimum_is_exact(tensor.record()):
            return BLOCK_TYPES["Q4_1"], False
        if found := block_type(spec, width, BLOCK_TYPES[options.ternary.upper()]):
            return found, False
    if options.allow_requantize:
        return nearest_type(spec, width), True
    raise ExportError(
        f"no place for rows of {width} weights"
        if tensor.whole_zero_points
        else "zero points that are no whole numbers",
        where=tensor.name,
        rule=RULE,
        fix="export.format=merged, or export.allow_requantize=true, which rounds again, with a loss",
    )
