"""Write a model in AWQ's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.awq.config import PLACE, AwqOptions
from qtrain.export.awq.layer import awq_tensors
from qtrain.export.integers.plan import Plan, plan_model
from qtrain.export.integers.write import Layout, write_integers
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration


def write(
    model: DeployedModel,
    options: AwqOptions,
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
    plan = plan_model(model, options, shared_sizes=PLACE.group_sizes)
    _check_shapes(plan)
    layout = Layout("awq", "gemm", awq_tensors, quantization_config(plan))
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


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The description that transformers and vLLM read: one group size for all layers."""
    spec = next(iter(plan.specs.values()))
    return {
        "quant_method": "awq",
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *plan.kept],
    }


def _check_shapes(plan: Plan) -> None:
    for name, layer in plan.layers().items():
        rows, columns = layer.shape
        if rows % 8:
            raise ExportError(
                f"a weight [{rows}, {columns}]",
                where=name,
                rule="a word of AWQ holds eight outputs: their number is a multiple of 8",
                fix="export.format=compressed-tensors" + ("" if plan.trained else f", or export.ignore=[{name}]"),
            )
