"""Write a model as one .gguf file, a tensor at a time."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize as quantize_again
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.card import write_card
from qtrain.export.gguf.architecture import (
    ROPE_FACTORS,
    add_metadata,
    architecture_of,
    notes_on,
    rope_factors,
    row_order,
)
from qtrain.export.gguf.blocks import SPECS, pack_blocks, stored_record
from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.plan import PlacedTensor, file_type, plan_tensors
from qtrain.export.gguf.tensor_data import TensorData
from qtrain.export.gguf.vocabulary import Vocabulary, add_vocabulary, vocabulary_of
from qtrain.export.integers.records import quantize_linear
from qtrain.export.partial import partial_export
from qtrain.export.sizes import parse_size
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration

FILE = "model.gguf"
QUANTIZATION_VERSION = 2
logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it tells the byte order and the temporary path


def write(
    model: DeployedModel,
    options: GgufOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory``/model.gguf and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    The file begins with the names, types and places of all tensors; after that each is computed, packed, written and
    let go.

    Raises:
        ExportError: a model, a tokenizer or a layer that has no place in this format, or a weight that is not finite.
    """
    begin = time.monotonic()
    plan = plan_tensors(model, options)
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, _rows(plan), options.pre_tokenizer)
    factors = rope_factors(model.config)
    with partial_export(directory, resume) as export:
        temporary, size = export.files, parse_size(options.max_shard_size)
        head, alignment = _head(model, plan, facts, tokenizer, vocabulary, factors)
        with TensorData(temporary / FILE, head, alignment, export.journal, size) as data:
            if factors is not None and not data.finished:
                data.add(factors.numpy(), False)
            before = len(data.finished) - (factors is not None)
            left: Iterable[PlacedTensor] = plan[before:]
            if progress is not None:
                left = progress(left, len(plan) - before)  # type: ignore[arg-type, assignment]
            for placed in left:
                packed, changed = _packed(placed, options)
                order = row_order(model.config, placed.tensor.name)
                data.add((packed if order is None else packed[order]).numpy(), changed)
            changes = data.finished[len(data.finished) - len(plan) :]
        lossy = [placed.tensor.name for placed, changed in zip(plan, changes, strict=True) if changed]
        result = _result(model, options, plan, vocabulary, lossy)
        result["bytes"] = (temporary / FILE).stat().st_size
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_card(temporary, facts, result)
    return result


def _head(
    model: DeployedModel,
    plan: list[PlacedTensor],
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: Vocabulary | None,
    factors: Tensor | None,
) -> tuple[bytes, int]:
    """The file up to its first tensor, and the alignment of those."""
    rows = _rows(plan)
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / FILE, MODEL_ARCH_NAMES[architecture_of(model.config).arch])
        try:
            _add_labels(writer, plan, facts)
            add_keys(writer, model.config, rows, tokenizer, vocabulary)
            if factors is not None:
                writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
            for placed in plan:
                shape = placed.tensor.shape
                # The dtype is of no account where a type is given, unless it is uint8.
                writer.add_tensor_info(placed.name, shape, np.dtype(np.float32), _bytes_of(placed), placed.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return (Path(folder) / FILE).read_bytes(), writer.data_alignment


def _rows(plan: list[PlacedTensor]) -> int:
    """Of the embedding."""
    return next(placed.tensor.shape[0] for placed in plan if placed.name == "token_embd.weight")


def add_keys(
    writer: GGUFWriter,
    config: PretrainedConfig,
    rows: int,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: Vocabulary | None,
) -> None:
    """All that decides what a reader computes: the architecture's keys and the vocabulary's.

    Args:
        rows: of the embedding.
    """
    add_metadata(writer, config, rows)
    if tokenizer is None or vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_vocabulary(writer, vocabulary, tokenizer)


def _add_labels(writer: GGUFWriter, plan: list[PlacedTensor], facts: Mapping[str, Any]) -> None:
    writer.add_type("model")
    # transformers takes a model of this name for another architecture.
    name = str(facts.get("name") or Path(str(facts.get("base_model") or "model")).name)
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_file_type(file_type(plan))
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _bytes_of(placed: PlacedTensor) -> int:
    size, width = GGML_QUANT_SIZES[placed.type]
    return torch.Size(placed.tensor.shape).numel() // size * width


def _packed(placed: PlacedTensor, options: GgufOptions) -> tuple[Tensor, bool]:
    """Bytes uint8 [rows, bytes of a row], and whether they hold other weights than were trained."""
    tensor, kind = placed.tensor, placed.blocks
    if kind is None:
        return _floats(placed), placed.lossy
    if not placed.lossy:
        record = quantize_linear(tensor, SPECS[kind.name]) if tensor.record is None else tensor.record()
        try:
            return pack_blocks(stored_record(record, kind), kind), False
        except ExportError as error:
            if not options.allow_requantize:
                raise ExportError(error.what, where=tensor.name, rule=error.rule, fix=error.fix) from error
    levels = tensor.value().detach().to("cpu", torch.float32).contiguous()
    return torch.from_numpy(quantize_again(levels.numpy(), placed.type)), True


def _floats(placed: PlacedTensor) -> Tensor:
    dtypes = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    value = placed.tensor.value().detach().to("cpu", dtypes.get(placed.type, torch.float32)).contiguous()
    if not bool(value.isfinite().all()):
        raise ExportError(f"NaN or inf as {value.dtype}", where=placed.tensor.name, rule="exported weights are finite")
    return value.view(torch.uint8).view(len(value), -1)


def _result(
    model: DeployedModel,
    options: GgufOptions,
    plan: list[PlacedTensor],
    vocabulary: Vocabulary | None,
    lossy: list[str],
) -> dict[str, Any]:
    blocks = [placed for placed in plan if placed.blocks is not None]
    weights = sum(torch.Size(placed.tensor.shape).numel() for placed in blocks)
    facts: dict[str, Any] = {
        "format": "gguf",
        "file": FILE,
        "types": dict(Counter(placed.type.name for placed in plan)),
        "quantized_layers": len(blocks),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codes": ("as trained" if not lossy else "lossy") if model.trained_codes else options.quantize,
        "lossy": lossy,
        "pre_tokenizer": vocabulary and vocabulary.pre,
        "notes": [*_notes(model, options, plan, vocabulary, lossy), *notes_on(model.config), *model.notes],
    }
    if blocks:
        facts["bits_per_quantized_weight"] = round(8 * sum(map(_bytes_of, blocks)) / weights, 4)
    return facts


def _notes(
    model: DeployedModel,
    options: GgufOptions,
    plan: list[PlacedTensor],
    vocabulary: Vocabulary | None,
    lossy: list[str],
) -> list[str]:
    notes = []
    linears = [placed for placed in plan if placed.tensor.linear]
    if lossy:
        notes.append(f"lossy: {len(lossy)} layers were rounded again, to ggml's nearest type: {lossy[0]}, ...")
    wide = [
        placed for placed in linears if placed.type.name == "Q8_0" and (spec := placed.tensor.spec) and spec.bits < 8
    ]
    if wide and not lossy:
        notes.append(f"{len(wide)} layers are in Q8_0: the smallest type that holds their levels without a loss")
    if any(placed.tensor.activation for placed in linears):
        notes.append("inputs were trained in int8; llama.cpp rounds them by itself, in blocks of 32")
    if options.quantize != "none" and not model.trained_codes and (odd := [x for x in linears if x.blocks is None]):
        notes.append(f"{len(odd)} layers are no whole blocks of 32 and stay unquantized")
    if vocabulary is None:
        notes.append("there is no tokenizer in the file")
    return notes
