"""Write a model of integer weights, a layer at a time, in whatever layout a format gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.integers.config import IntegerOptions
from qtrain.export.integers.plan import Plan, module_name
from qtrain.export.integers.records import records
from qtrain.export.partial import partial_export
from qtrain.export.shards import ShardWriter
from qtrain.export.sizes import parse_size
from qtrain.export.writer import Progress
from qtrain.files import write_json
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.activation_stats import Calibration


@dataclass(frozen=True)
class Layout:
    """What a format adds to a plan.

    Attributes:
        format: its name.
        name: of the layout within the format, for the card.
        tensors: of one layer, by their names after the layer's: ``weight_packed``.
        header: ``quantization_config`` of config.json.
        files: others that repeat the header, by name.
        notes: what who runs the checkpoint must know and cannot read from it.
        vllm: it has a kernel for each layer.
    """

    format: str
    name: str
    tensors: Callable[[str, LinearRecord], dict[str, Tensor]]
    header: dict[str, Any]
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    vllm: bool = True


def write_integers(
    model: DeployedModel,
    options: IntegerOptions,
    plan: Plan,
    layout: Layout,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    Layer by layer: a merged weight is computed, quantized, packed and let go; beside the model there is one layer and
    one file of weights in memory, and the Hessians of a few layers if GPTQ rounds.

    Raises:
        ExportError: a weight that is not finite, or that the layout has no place for.
    """
    begin = time.monotonic()
    layers = plan.layers().values()
    plain = [tensor.name for tensor in plan.tensors if module_name(tensor.name) not in plan.specs]
    with partial_export(directory, resume) as export:
        with ShardWriter(export.files, parse_size(options.max_shard_size), journal=export.journal) as shards:
            left = [tensor for tensor in plan.tensors if not shards.holds(tensor.name)]
            for tensor, record in records(plan, options, calibration, left, progress):
                if record is None:
                    shards.add(tensor.name, tensor.value().to(model.dtype))
                    continue
                name = module_name(tensor.name)
                tensors = layout.tensors(name, record)
                shards.add_all(tensor.name, {f"{name}.{key}": value for key, value in tensors.items()})
        temporary = export.files
        write_companions(model, temporary, tokenizer, layout.header)
        for name in layout.files:
            write_json(temporary / name, layout.header)
        unweighed = [] if plan.trained or calibration is not None else [_unweighed(options)]
        result = {
            "format": layout.format,
            "layout": layout.name,
            "bits": max(spec.bits for spec in plan.specs.values()),
            "zero_points": any(not spec.symmetric for spec in plan.specs.values()),
            "number": "fp" if any(spec.is_float for spec in plan.specs.values()) else "int",
            "inputs": plan.activation and _inputs(plan.activation),
            "bits_per_quantized_weight": round(
                8 * shards.bytes_of(plain) / sum(torch.Size(layer.shape).numel() for layer in layers), 4
            ),
            "bytes": shards.total_bytes,
            "quantized_layers": len(plan.specs),
            "group_sizes": plan.group_sizes(),
            "fallbacks": plan.fallbacks,
            "kept": plan.kept,
            "scales": "as trained" if plan.trained else options.scales,
            "rounding": "as trained" if plan.trained else options.rounding if calibration else "nearest",
            "calibration_tokens": sum(ids.numel() for ids in calibration.rows) if calibration else 0,
            "vllm": layout.vllm,
            "dtype": str(model.dtype).removeprefix("torch."),
            "notes": [*plan.notes(), *layout.notes, *model.notes, *unweighed],
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(temporary, facts, result)
    return result


def _inputs(spec: QuantSpec) -> str:
    shared = "one static range a layer" if spec.granularity == "per_tensor" else "one scale a token"
    return f"{'fp' if spec.is_float else 'int'}{spec.bits}, {shared}"


def _unweighed(options: IntegerOptions) -> str:
    return f"no calibration text: scales={options.scales} weighs all inputs alike, codes are the nearest ones"
