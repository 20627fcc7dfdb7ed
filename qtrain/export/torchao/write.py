"""Write a model as torchao's integer and fp8 tensors, a layer at a time."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.integers.records import codes_alone
from qtrain.export.partial import partial_export
from qtrain.export.shards import ShardWriter
from qtrain.export.sizes import parse_size
from qtrain.export.torchao.config import TorchaoOptions
from qtrain.export.torchao.layer import description, quantization_config, tensors_of
from qtrain.export.torchao.trained import check_layers
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.ptq.activation_stats import Calibration

INPUTS_IN_FP8 = (
    "torchao (0.18) rounds the scale of a token to the dtype it runs in, where the training keeps it in fp32: codes of "
    "inputs are the training's in fp32 alone; checked on a CPU, while its product for GPUs, which wants bf16, compute "
    "capability 8.9 and widths in multiples of 16, was not run"
)


def write(
    model: DeployedModel,
    options: TorchaoOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    Raises:
        ExportError: codes that were not trained, or that torchao's tensors cannot hold.
    """
    begin = time.monotonic()
    tensors = list(model.tensors())
    if not model.trained_codes:
        raise ExportError(
            "export.format=torchao writes codes that were trained, and this model has none",
            fix="export.format=compressed-tensors chooses codes; or train them: method.name=qat or peqa",
        )
    linears = {tensor.name.removesuffix(".weight"): tensor for tensor in tensors if tensor.linear}
    check_layers((name, tensor.spec, tensor.activation) for name, tensor in linears.items())
    coded = {name: tensor for name, tensor in linears.items() if tensor.spec is not None}
    described = {tensor.name: _described(tensor, model) for tensor in coded.values()}

    def metadata(names: Sequence[str]) -> dict[str, str]:
        """Of one file: its own tensors; and the names of all, for readers keep only one file's list of them."""
        own = dict.fromkeys(re.sub(r"\._weight_\w+$", ".weight", name) for name in names)
        every = json.dumps([tensor.name for tensor in tensors])
        return {**{name: described.get(name, json.dumps({"_type": "Tensor"})) for name in own}, "tensor_names": every}

    with partial_export(directory, resume) as export:
        size = parse_size(options.max_shard_size)
        with ShardWriter(export.files, size, metadata, journal=export.journal) as shards:
            left = [tensor for tensor in tensors if not shards.holds(tensor.name)]
            for tensor in progress(left, len(left)) if progress else left:
                name = tensor.name.removesuffix(".weight")
                if name not in coded or tensor.record is None:
                    shards.add(tensor.name, tensor.value().to(model.dtype))
                else:
                    record = codes_alone(tensor.name, tensor.record())
                    shards.add_all(tensor.name, tensors_of(name, record, model.dtype), together=True)
        plain = [tensor.name for tensor in tensors if tensor.name not in described]
        weights = sum(torch.Size(tensor.shape).numel() for tensor in coded.values())
        (spec, activation), _ = Counter((tensor.spec, tensor.activation) for tensor in coded.values()).most_common()[0]
        assert spec is not None
        write_companions(model, export.files, tokenizer, quantization_config(spec, activation))
        result = {
            "format": "torchao",
            "bits": max(tensor.spec.bits for tensor in coded.values() if tensor.spec is not None),
            "zero_points": any(tensor.spec is not None and not tensor.spec.symmetric for tensor in coded.values()),
            "number": "fp" if spec.is_float else "int",
            "inputs": activation and f"{activation.format}, one scale a token",
            "bits_per_quantized_weight": round(8 * shards.bytes_of(plain) / weights, 4),
            "bytes": shards.total_bytes,
            "quantized_layers": len(coded),
            "group_sizes": dict(Counter(str(t.spec.group_size or "row") for t in coded.values() if t.spec is not None)),
            "scales": "as trained",
            "rounding": "as trained",
            "kept": [name for name in linears if name not in coded],
            "dtype": str(model.dtype).removeprefix("torch."),
            "notes": [*_notes(coded.values()), *model.notes],
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(export.files, facts, result)
    return result


def _notes(coded: Iterable[DeployedTensor]) -> list[str]:
    notes = []
    specs = {(tensor.spec, tensor.activation) for tensor in coded}
    if any(spec is not None and not spec.is_float for spec, _ in specs):
        notes.append("a byte a code, whatever its bits: ExecuTorch packs them when it lowers a model")
    if any(activation is not None and activation.is_float for _, activation in specs):
        notes.append(INPUTS_IN_FP8)
    return notes


def _described(tensor: DeployedTensor, model: DeployedModel) -> str:
    assert tensor.spec is not None
    return description(tensor.spec, tensor.activation, tensor.shape, model.dtype)
