"""Write a model as compressed-tensors: packed weights, or weights in bytes beside int8 inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtrain.export.compressed_tensors.cache_scales import with_cache_scales
from qtrain.export.compressed_tensors.config import CompressedTensorsOptions
from qtrain.export.compressed_tensors.kv_cache import cache_notes, cache_served_by_vllm
from qtrain.export.compressed_tensors.layer import byte_tensors, packed_tensors
from qtrain.export.compressed_tensors.scheme import quantization_config
from qtrain.export.integers.plan import Plan, plan_model
from qtrain.export.integers.write import Layout, write_integers
from qtrain.export.writer import Progress
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
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    Raises:
        ExportError: a weight that is not finite, nothing to quantize, or codes that have no place here.
    """
    cache = model.cache.section if model.cache is not None else None
    options.check_cache(cache)
    if cache is not None:
        model = with_cache_scales(model)
    plan = plan_model(model, options)
    header = quantization_config(plan.specs, ["lm_head", *plan.kept], plan.activation, cache)
    tensors_of = packed_tensors if header["format"] == "pack-quantized" else byte_tensors
    layout = Layout(
        "compressed-tensors",
        header["format"],
        lambda name, record: tensors_of(record, model.dtype),
        header,
        notes=() if cache is None else cache_notes(cache, plan.specs.values()),
        vllm=_served_by_vllm(plan) and (cache is None or cache_served_by_vllm(cache)),
    )
    return write_integers(
        model,
        options,
        plan,
        layout,
        directory,
        tokenizer=tokenizer,
        facts=facts,
        calibration=calibration,
        progress=progress,
        resume=resume,
    )


def _served_by_vllm(plan: Plan) -> bool:
    """Whether vLLM has a scheme for the layers: beside int8 inputs its int8 weights have no groups (0.32)."""
    inputs = plan.activation is not None
    return not any(inputs and spec.format == "int8" and spec.group_size for spec in plan.specs.values())
