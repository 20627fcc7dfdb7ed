"""A .gguf file beside the model that it was written from: every key, every code, every other number."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, ReaderTensor, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.gguf.architecture import ROPE_FACTORS, architecture_of, rope_factors, row_order, tensor_name
from qtrain.export.gguf.plan import FLOATS
from qtrain.export.gguf.readback import differing, open_file, stored_layers
from qtrain.export.gguf.trained import BLOCK_TYPES
from qtrain.export.gguf.vocabulary import vocabulary_of
from qtrain.export.gguf.write import add_keys
from qtrain.modules.deployed import DeployedModel

DTYPES = {kind.name: dtype for dtype, kind in FLOATS.items()}
MISSING = "missing"


def differences(
    path: Path,
    model: DeployedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pre_tokenizer: str | None = None,
    lossy: Collection[str] = (),
) -> Iterator[ExportError]:
    """In what the file is another one than ``write`` makes of the model; nothing: it is what was trained.

    Args:
        pre_tokenizer: ``export.pre_tokenizer``.
        lossy: names of weights that were rounded again when it was written, whose codes tell nothing.

    Raises:
        ExportError: it cannot be read.
    """
    reader = open_file(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    layers = stored_layers(reader)
    names = get_tensor_name_map(architecture_of(model.config).arch, model.config.num_hidden_layers)
    for tensor in model.tensors():
        stored = found.pop(tensor_name(names, tensor.name), None)
        if stored is None:
            yield ExportError("it is missing", where=tensor.name, rule="a file has every tensor of the model")
        elif tuple(reversed(stored.shape.tolist())) != tensor.shape:
            yield ExportError(f"shape {list(reversed(stored.shape.tolist()))}, not {tensor.shape}", where=tensor.name)
        elif stored.tensor_type.name not in BLOCK_TYPES:
            own = tensor.value().detach().cpu()
            order = row_order(model.config, tensor.name)
            yield from _numbers(stored, own if order is None else own[order], tensor.name)
        elif tensor.record is not None and tensor.name not in lossy:
            record = tensor.record()
            if count := differing(record, layers[tensor.name.removesuffix(".weight")]()):
                what = f"{count:,} of {record.codes.numel():,} weights are of other codes or scales"
                yield ExportError(what, where=tensor.name, rule="an export holds the codes of the last training step")
    factors, stored = rope_factors(model.config), found.pop(ROPE_FACTORS, None)
    if (factors is None) != (stored is None):
        yield ExportError(f"{'one too many' if factors is None else MISSING}", where=ROPE_FACTORS)
    elif factors is not None and stored is not None:
        yield from _numbers(stored, factors, ROPE_FACTORS)
    for name in found:
        yield ExportError("no tensor of the model is called so", where=name)
    yield from _keys(reader, model, tokenizer, pre_tokenizer)


def _numbers(stored: ReaderTensor, own: Tensor, name: str) -> Iterator[ExportError]:
    dtype = DTYPES.get(stored.tensor_type.name)
    if dtype is None:
        yield ExportError(f"ggml type {stored.tensor_type.name}", where=name, rule="it is unquantized in the run")
        return
    there = torch.from_numpy(np.array(stored.data)).contiguous().view(torch.uint8).flatten()
    here = own.to(dtype).contiguous().view(torch.uint8).flatten()
    if not torch.equal(there, here):
        count = int((there != here).view(-1, dtype.itemsize).any(dim=1).sum())
        yield ExportError(
            f"{count:,} of {own.numel():,} numbers differ", where=name, rule="they are written bit by bit"
        )


def _keys(
    reader: GGUFReader, model: DeployedModel, tokenizer: PreTrainedTokenizerBase | None, pre_tokenizer: str | None
) -> Iterator[ExportError]:
    rows = next(tensor.shape[0] for tensor in model.tensors() if tensor.name.endswith("embed_tokens.weight"))
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture_of(model.config).arch])
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, rows, pre_tokenizer)
    add_keys(writer, model.config, rows, tokenizer, vocabulary)
    own: dict[str, Any] = {key: held.value for key, held in writer.kv_data[0].items()}
    there = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF.", "general."))}
    there["general.architecture"] = reader.fields["general.architecture"].contents()
    for key in sorted(own.keys() | there.keys()):
        one, other = there.get(key, MISSING), own.get(key, MISSING)
        if isinstance(other, float):
            other = float(np.float32(other))  # as which the file holds it
        if isinstance(other, list):
            one, other = _first_difference(one, other)
        if one != other:
            yield ExportError(f"{str(one)[:60]!r} there, {str(other)[:60]!r} in the run", where=key)


def _first_difference(one: Any, other: list[Any]) -> tuple[Any, Any]:
    if not isinstance(one, list) or len(one) != len(other):
        return len(one) if isinstance(one, list) else one, len(other)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return pairs[0] if pairs else (None, None)
