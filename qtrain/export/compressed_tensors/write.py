"""Write a model as pack-quantized compressed-tensors, a layer at a time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError, ModelError
from qtrain.export.card import write_card
from qtrain.export.companions import write_companions
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.scheme import quantization_config
from qtrain.export.record import LinearRecord
from qtrain.export.shards import ShardWriter, parse_size
from qtrain.export.writer import Progress
from qtrain.files import atomic_directory
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.numerics.affine import choose_qparams, largest_divisor, quantize
from qtrain.numerics.packing import pack
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.activation_stats import Calibration
from qtrain.ptq.gptq import gptq_codes


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
    one file of weights in memory.

    Raises:
        ExportError: a weight that is not finite, or nothing to quantize.
    """
    begin = time.monotonic()
    tensors = list(model.tensors())
    plan, fallbacks = _plan(tensors, options)
    kept = [_module(t.name) for t in tensors if t.linear and _module(t.name) not in plan]
    moments = _second_moments(plan, options, calibration)
    if not plan:
        raise ExportError(
            "no layer is left to quantize",
            where="export.ignore",
            rule="at least one linear layer is quantized",
            fix="export.format=merged writes unquantized weights",
        )
    bits: Counter[str] = Counter()
    with atomic_directory(directory) as temporary:
        with ShardWriter(temporary, parse_size(options.max_shard_size)) as shards:
            for tensor in progress(tensors, len(tensors)) if progress else tensors:
                name = _module(tensor.name)
                if name not in plan:
                    shards.add(tensor.name, tensor.value().to(model.dtype))
                    continue
                record = quantize_linear(tensor, plan[name], options.scales, next(moments)[1])
                before = shards.total_bytes
                for key, value in packed_tensors(record).items():
                    shards.add(f"{name}.{key}", value)
                bits["linear"] += 8 * (shards.total_bytes - before)
                bits["weights"] += record.codes.numel()
        write_companions(model, temporary, tokenizer, quantization_config(plan, ["lm_head", *kept]))
        result = {
            "format": "compressed-tensors",
            "bits": options.bits,
            "bits_per_quantized_weight": round(bits["linear"] / bits["weights"], 4),
            "bytes": shards.total_bytes,
            "quantized_layers": len(plan),
            "group_sizes": {str(size or "row"): n for size, n in Counter(s.group_size for s in plan.values()).items()},
            "fallbacks": fallbacks,
            "kept": kept,
            "scales": options.scales,
            "rounding": options.rounding if calibration else "nearest",
            "calibration_tokens": sum(ids.numel() for ids in calibration.rows) if calibration else 0,
            "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_card(temporary, facts, result)
    return result


def quantize_linear(
    tensor: DeployedTensor, spec: QuantSpec, scales: str = "mse", moment: Tensor | None = None
) -> LinearRecord:
    """Compute the weight and decide its codes.

    Args:
        scales: mse or absmax.
        moment: of the layer's input: E[x_j^2] [in] weighs the scale search; E[x x^T] [in, in] does that with its
            diagonal and has the codes decided by GPTQ; None: all columns alike, the nearest codes.
    """
    weight = tensor.value().detach()
    hessian = moment if moment is not None and moment.ndim == 2 else None
    importance = moment if hessian is None else hessian.diagonal()
    try:
        qparams = search_qparams(weight, spec, importance) if scales == "mse" else choose_qparams(weight, spec)
        codes = quantize(weight, qparams, spec) if hessian is None else gptq_codes(weight, qparams, hessian, spec)
    except ModelError as error:
        raise ExportError(
            error.what, where=tensor.name, rule=error.rule, fix=f"export.ignore=[{_module(tensor.name)}]"
        ) from error
    return LinearRecord(codes, *qparams, spec)


def packed_tensors(record: LinearRecord) -> dict[str, Tensor]:
    """The tensors of one layer: weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape."""
    return {
        "weight_packed": pack(record.codes, record.spec.bits),
        "weight_scale": record.scale,
        "weight_shape": torch.tensor(record.codes.shape, dtype=torch.int64),
    }


def _plan(
    tensors: Iterable[DeployedTensor], options: CompressedTensorsOptions
) -> tuple[dict[str, QuantSpec], list[dict[str, Any]]]:
    """Module name to spec for every layer to quantize, and the widths whose group size had to fall back."""
    plan: dict[str, QuantSpec] = {}
    fallbacks: dict[int, dict[str, Any]] = {}
    for tensor in tensors:
        name = _module(tensor.name)
        if not tensor.linear or any(_matches(name, pattern) for pattern in options.ignore):
            continue
        width = tensor.shape[1]
        size = None if options.group_size == -1 else largest_divisor(width, options.group_size)
        if options.group_size not in (-1, size):
            entry = {"in_features": width, "asked": options.group_size, "used": size or -1, "layers": 0}
            fallbacks.setdefault(width, entry)["layers"] += 1
        plan[name] = QuantSpec(
            format=f"int{options.bits}",
            granularity="per_group" if size else "per_channel",
            group_size=size,
            full_range=True,
            scale_dtype="bf16",
        )
    return plan, list(fallbacks.values())


def _second_moments(
    plan: Mapping[str, QuantSpec], options: CompressedTensorsOptions, calibration: Calibration | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each layer with what its rounding wants to know of its inputs, in the order of the plan."""
    if calibration is None:
        return zip(plan, repeat(None))
    if options.rounding == "gptq":
        return calibration.hessians(list(plan))
    if options.scales == "mse":
        return iter(calibration.second_moments(plan).items())
    return zip(plan, repeat(None))


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern


def _module(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight")
