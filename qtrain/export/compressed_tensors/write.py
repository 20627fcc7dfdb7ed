"""Write a model as compressed-tensors, a layer at a time: packed weights, or weights in bytes beside int8 inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.layer import byte_tensors, packed_tensors, quantize_linear
from qtrain.export.compressed_tensors.plan import Plan, module_name, plan_layers, plan_trained
from qtrain.export.compressed_tensors.scheme import quantization_config
from qtrain.export.shards import ShardWriter, parse_size
from qtrain.export.writer import Progress
from qtrain.files import atomic_directory
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration


def write(
    model: DeployedModel,
    options: CompressedTensorsOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    Layer by layer: a merged weight is computed, quantized, packed and let go; beside the model there is one layer and
    one file of weights in memory, and the Hessians of a few layers if GPTQ rounds.

    Raises:
        ExportError: a weight that is not finite, or nothing to quantize.
    """
    begin = time.monotonic()
    tensors = list(model.tensors())
    trained = model.trained_codes
    plan = plan_trained(tensors) if trained else plan_layers(tensors, options)
    moments = iter(()) if trained else _input_moments(plan, options, calibration)
    quantized_bytes = quantized_weights = 0
    with atomic_directory(directory) as temporary:
        with ShardWriter(temporary, parse_size(options.max_shard_size)) as shards:
            for tensor in progress(tensors, len(tensors)) if progress else tensors:
                name = module_name(tensor.name)
                if name not in plan.specs:
                    shards.add(tensor.name, tensor.value().to(model.dtype))
                    continue
                before = shards.total_bytes
                if tensor.record is not None:
                    record = tensor.record()
                else:
                    record = quantize_linear(tensor, plan.specs[name], options.scales, next(moments)[1])
                for key, value in (byte_tensors if plan.activation else packed_tensors)(record, model.dtype).items():
                    shards.add(f"{name}.{key}", value)
                quantized_bytes += shards.total_bytes - before
                quantized_weights += record.codes.numel()
        layout = quantization_config(plan.specs, ["lm_head", *plan.kept], plan.activation)
        write_companions(model, temporary, tokenizer, layout)
        result = {
            "format": "compressed-tensors",
            "layout": layout["format"],
            "bits": max(spec.bits for spec in plan.specs.values()),
            "inputs": plan.activation and f"int{plan.activation.bits}, one scale a token",
            "bits_per_quantized_weight": round(8 * quantized_bytes / quantized_weights, 4),
            "bytes": shards.total_bytes,
            "quantized_layers": len(plan.specs),
            "group_sizes": plan.group_sizes(),
            "fallbacks": plan.fallbacks,
            "kept": plan.kept,
            "scales": "as trained" if trained else options.scales,
            "rounding": "as trained" if trained else options.rounding if calibration else "nearest",
            "calibration_tokens": sum(ids.numel() for ids in calibration.rows) if calibration else 0,
            "dtype": str(model.dtype).removeprefix("torch."),
            "notes": [*plan.notes(), *model.notes, *([] if trained else _notes(options, calibration))],
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(temporary, facts, result)
    return result


def _input_moments(
    plan: Plan, options: CompressedTensorsOptions, calibration: Calibration | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each layer with what its quantization wants to know of its inputs, in the order of the plan."""
    if calibration is not None and options.rounding == "gptq":
        return calibration.hessians(list(plan.specs))
    if calibration is not None and options.scales == "mse":
        return iter(calibration.second_moments(plan.specs).items())
    return zip(plan.specs, repeat(None))


def _notes(options: CompressedTensorsOptions, calibration: Calibration | None) -> list[str]:
    if calibration is not None:
        return []
    return [f"no calibration text: scales={options.scales} weighs all inputs alike, codes are the nearest ones"]
