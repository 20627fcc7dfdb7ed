"""A finished run as a checkpoint that other programs load, measured against the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.data.sample import Sample
from qtrain.errors import ExportError
from qtrain.evaluation.drift import Drift, drift
from qtrain.evaluation.progress import progress_over
from qtrain.export.card import write_card
from qtrain.files import write_json
from qtrain.models.config import ModelSection
from qtrain.models.dtype import DTYPES, resolve_dtypes
from qtrain.models.load import load_model
from qtrain.modules.deployed import DeployedModel
from qtrain.ptq.activation_stats import Calibration, Context
from qtrain.registry import resolve
from qtrain.report.write import write_report
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory
from qtrain.training.tracking import close, log_artifacts, loggers
from qtrain.training.trained import best_device, trained_module


def export_run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write ``export.format`` to ``export.dir`` (default RUN/export/FORMAT); the facts, as export.json holds them.

    Raises:
        ExportError: the directory holds something that is no export.
    """
    options, device = config.export, best_device()
    directory = Path(options.dir) if options.dir else run.export(options.format)
    _check_target(directory)
    module = trained_module(config, run, device)
    assert module.model is not None
    data = LanguageData(config.data, module.tokenizer, seed=config.run.seed)
    data.setup("fit")
    facts = _facts(config, run, module.method.lines(module.model))
    write = resolve(options.implementation)
    if options.takes == "trained":
        if not isinstance(module.model, PeftModel):
            raise ExportError(
                f"export.format={options.format} writes PEFT's adapters, and method.name={config.method.name} has none",
                fix="export.format=compressed-tensors",
            )
        found: dict[str, Any] = write(module.model, directory, module.tokenizer, facts)
    else:
        storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
        base = getattr(options, "base", "dequantized")
        deployed = _deployed(module, config, base, storage)
        rows = 0 if deployed.trained_codes else getattr(options, "calibration_rows", 0)
        context = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16)
        found = write(
            deployed,
            options,
            directory,
            tokenizer=module.tokenizer,
            facts=facts,
            calibration=_calibration(module, data, rows, context),
            progress=progress_over("exporting"),
        )
        if options.evaluate:
            with context():
                candidate = load_model(ModelSection(path=str(directory)), storage, device=device)
                module.method.serve(module.model, candidate)
                found |= _measure(module, candidate, data, config).to_dict()
                del candidate
                if hasattr(options, "base") and module.method.why_no_original() is None:
                    found["alternative"] = _alternative(module, config, data, storage, base)
            write_card(directory, facts | {"figures": _figures(found)}, found)
    found["directory"] = str(directory)
    _record(run, options.format, found)
    write_report(run.path)
    if config.wandb.enabled:
        again = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
        open_loggers = loggers(again, run.path)
        log_artifacts(config, open_loggers, {"export": directory})
        close(open_loggers)
    return found


def _deployed(module: LanguageModule, config: Config, base: str, storage: torch.dtype) -> DeployedModel:
    weights: Mapping[str, Tensor] | None = None
    if base == "original":
        if reason := module.method.why_no_original():
            raise ExportError(reason, where="export.base=original", fix="leave export.base out")
        weights = load_model(config.model, torch.float32).state_dict()
    assert module.model is not None
    return module.method.deployed(module.model, dtype=DTYPES.get(config.export.dtype, storage), base=weights)


def _calibration(module: LanguageModule, data: LanguageData, rows: int, context: Context) -> Calibration | None:
    if not rows:
        return None
    assert module.model is not None
    samples = data.samples("train", rows * data.section.max_length)
    return Calibration(module.method.plain_model(module.model), [_ids(sample) for sample in samples], context)


def _measure(module: LanguageModule, candidate: PreTrainedModel, data: LanguageData, config: Config) -> Drift:
    assert module.model is not None
    split = "train" if config.data.validation is None else "validation"
    samples = data.samples(split, config.export.evaluate_windows * config.data.max_length)
    device = candidate.device
    rows = [_ids(sample).to(device) for sample in samples]
    labels = [torch.tensor([sample.labels]) for sample in samples]
    return drift(module.method.plain_model(module.model), candidate, rows, labels=labels)


def _alternative(
    module: LanguageModule, config: Config, data: LanguageData, storage: torch.dtype, base: str
) -> dict[str, Any]:
    """The drift of merging into the other base: dequantized, which was trained on, or original."""
    other = "original" if base == "dequantized" else "dequantized"
    candidate = load_model(config.model, storage, device=best_device())
    deployed = _deployed(module, config, other, storage)
    with torch.no_grad():
        parameters = dict(candidate.named_parameters())
        for tensor in deployed.tensors():
            if tensor.name in parameters:
                parameters[tensor.name].copy_(tensor.value())
    found = _measure(module, candidate, data, config)
    return {"base": other, "kl": found.kl, "top1": found.top1, "candidate_perplexity": found.candidate_perplexity}


def _ids(sample: Sample) -> Tensor:
    return torch.tensor([sample.input_ids])


def _facts(config: Config, run: RunDirectory, done: list[str]) -> dict[str, Any]:
    fit = json.loads(run.result("fit").read_text(encoding="utf-8")) if run.result("fit").exists() else {}
    shown = {
        "steps": fit.get("steps"),
        "held-out loss before": fit.get("val_loss_before"),
        "held-out loss after": fit.get("val_loss_after"),
    }
    return {
        "base_model": config.model.path,
        "recipe": config.recipe,
        "method": f"{config.method.name}: " + "; ".join(" ".join(line.split()) for line in done),
        "training": {name: f"{value:.4g}" for name, value in shown.items() if value is not None},
    }


def _figures(found: Mapping[str, Any]) -> list[dict[str, str]]:
    before, after = found["reference_perplexity"], found["candidate_perplexity"]
    return [
        {"name": "perplexity", "trained": f"{before:.3f}", "exported": f"{after:.3f}"},
        {"name": "KL to the trained model, nats a token", "trained": "0", "exported": f"{found['kl']:.2e}"},
        {"name": "same likeliest token", "trained": "100 %", "exported": f"{found['top1']:.2%}"},
    ]


def _check_target(directory: Path) -> None:
    """An export replaces an export; nothing else."""
    if directory.exists() and any(directory.iterdir()) and not (directory / "README.md").exists():
        raise ExportError(
            "the directory holds something else",
            where=str(directory),
            rule="an export replaces an earlier export alone",
            fix="export.dir=ANOTHER",
        )


def _record(run: RunDirectory, export_format: str, found: dict[str, Any]) -> None:
    path = run.result("export")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {export_format: found})
