"""Read a .gguf file back to codes and scales, by a reader of our own for its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, ReaderTensor, get_tensor_name_map

from qtrain.errors import ExportError, ModelError
from qtrain.export.gguf.architecture import ARCHITECTURES, interleaved_rows
from qtrain.export.gguf.blocks import SPECS, stored_record, unpack_blocks
from qtrain.export.gguf.trained import BLOCK_TYPES
from qtrain.models.gguf_header import check_gguf
from qtrain.modules.record import LinearRecord

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def read_records(path: Path) -> Iterator[tuple[str, LinearRecord]]:
    """Every quantized layer by its name in the plain checkpoint, in the checkpoint's order of rows; one at a time.

    Raises:
        ExportError: no GGUF file of an architecture that is written here.
    """
    for name, load in stored_layers(open_file(path)).items():
        yield name, load()


def stored_layers(reader: GGUFReader) -> dict[str, Callable[[], LinearRecord]]:
    """What reads each quantized layer of an open file."""
    name = _value(reader, "general.architecture")
    families = {MODEL_ARCH_NAMES[found.arch]: found for found in ARCHITECTURES.values()}
    if name not in families:
        raise ExportError(f"architecture {name!r}", rule=f"read back: {', '.join(families)}")
    layers = int(_value(reader, f"{name}.block_count"))
    heads = {
        "self_attn.q_proj": int(_value(reader, f"{name}.attention.head_count")),
        "self_attn.k_proj": int(_value(reader, f"{name}.attention.head_count_kv")),
    }
    names = get_tensor_name_map(families[name].arch, layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, Callable[[], LinearRecord]] = {}
    for layer in range(layers):
        for projection in PROJECTIONS:
            module = f"model.layers.{layer}.{projection}"
            tensor = tensors.get(f"{names.get_name(module)}.weight")
            if tensor is None:
                raise ExportError("no such tensor", where=module, rule="each layer has all of them")
            if tensor.tensor_type.name in BLOCK_TYPES:
                found[module] = partial(_record, tensor, heads.get(projection) if families[name].interleaved else None)
    return found


def open_file(path: Path) -> GGUFReader:
    """The file's keys and tensors, mapped into memory.

    Raises:
        ExportError: it is no GGUF file, or a part of one.
    """
    try:
        check_gguf(path)
        return GGUFReader(path)
    except ModelError as error:
        raise ExportError(
            f"no whole GGUF file: {error.what}", where=error.where, rule=error.rule, fix="export it again"
        ) from None
    except (OSError, ValueError, LookupError) as error:
        raise ExportError(
            f"no whole GGUF file: {error}",
            where=str(path),
            rule="keys and tensors that the gguf package reads",
            fix="export it again",
        ) from None


def differing_codes(path: Path, trained: Iterable[tuple[str, LinearRecord]]) -> dict[str, int]:
    """For each trained layer, how many weights of the file are others: another level, or another scale or zero point.

    A layer that is not in the file as codes differs whole. 0 everywhere: the file is what was trained.
    """
    found = stored_layers(open_file(path))
    counts = {}
    for name, record in trained:
        load = found.get(name)
        counts[name] = record.codes.numel() if load is None else differing(record, load())
    return counts


def differing(record: LinearRecord, found: LinearRecord) -> int:
    """How many weights of one trained layer are others in its blocks."""
    kind = next(kind for kind in BLOCK_TYPES.values() if SPECS[kind.name] == found.spec)
    try:
        expected = stored_record(record, kind)
    except ExportError:
        return record.codes.numel()
    ranges = expected.scale != found.scale
    if expected.zero_point is not None and found.zero_point is not None:
        ranges |= expected.zero_point != found.zero_point
    return int(((expected.codes != found.codes) | ranges.repeat_interleave(kind.size, dim=1)).sum())


def _record(tensor: ReaderTensor, heads: int | None) -> LinearRecord:
    record = unpack_blocks(torch.from_numpy(tensor.data.copy()), BLOCK_TYPES[tensor.tensor_type.name])
    if heads is None:
        return record
    order = interleaved_rows(heads, len(record.codes) // heads).argsort()
    zero = None if record.zero_point is None else record.zero_point[order]
    return LinearRecord(record.codes[order], record.scale[order], zero, record.spec)


def _value(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise ExportError(f"no key {key}", rule="a GGUF file says what it holds")
    return str(field.contents())
