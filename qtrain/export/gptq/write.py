"""Write a model in GPTQ's layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.gptq.config import PLACE, GptqOptions
from qtrain.export.gptq.header import kernel_notes, quantization_config, runs_in_vllm
from qtrain.export.gptq.layer import gptq_tensors
from qtrain.export.integers.plan import Plan, plan_model
from qtrain.export.integers.write import Layout, write_integers
from qtrain.export.writer import Progress
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration


def write(
    model: DeployedModel,
    options: GptqOptions,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Write ``directory`` and return what was done, for export.json (arguments: ``qtrain.export.writer``).

    quantize_config.json, which AutoGPTQ read, repeats what config.json says.

    Raises:
        ExportError: a weight that is not finite, nothing to quantize, or codes that have no place here.
    """
    plan = plan_model(model, options, shared_sizes=PLACE.group_sizes)
    _check_shapes(plan)
    version = _version(plan, options)
    header = quantization_config(plan, version)
    layout = Layout(
        "gptq",
        header["checkpoint_format"],
        partial(gptq_tensors, version=version),
        header,
        files=("quantize_config.json",),
        notes=tuple(kernel_notes(plan)),
        vllm=runs_in_vllm(plan),
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


def _version(plan: Plan, options: GptqOptions) -> int:
    symmetric = all(spec.symmetric for spec in plan.specs.values())
    if options.layout == "v1" and not symmetric:
        raise ExportError(
            "export.layout=v1 with zero points that were trained",
            rule="v1 stores them less one, and has no place for 0",
            fix="export.layout=v2, or auto",
        )
    return 1 if options.layout == "v1" or (options.layout == "auto" and symmetric) else 2


def _check_shapes(plan: Plan) -> None:
    for name, layer in plan.layers().items():
        rows, columns = layer.shape
        bits = plan.specs[name].bits
        # Words of 3 bits come in threes, of the zero points too.
        whole = columns * bits % 32 == 0 and (bits != 3 or rows % 32 == 0)
        if not whole:
            raise ExportError(
                f"a weight [{rows}, {columns}] in {bits} bits",
                where=name,
                rule="GPTQ's words are whole: inputs x bits is a multiple of 32; in 3 bits outputs are one too",
                fix="export.format=compressed-tensors" + ("" if plan.trained else f", or export.ignore=[{name}]"),
            )
