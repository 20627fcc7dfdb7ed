"""A finished run as a checkpoint that other programs load, measured against the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qtrain.config.schema import Config
from qtrain.errors import ErrorList, ExportError
from qtrain.evaluation.progress import progress_over
from qtrain.export.card import write_card
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.adapter import check_adapter
from qtrain.export.verify.files import digests
from qtrain.export.verify.verdict import Verdict
from qtrain.export.writer import Writer
from qtrain.files import read_json, write_json
from qtrain.models.fingerprint import fingerprint
from qtrain.models.load import load_model
from qtrain.models.source import find_model
from qtrain.paths import unreachable
from qtrain.registry import resolve
from qtrain.report.write import write_report
from qtrain.training.export_key import export_key
from qtrain.training.lineage import log_export
from qtrain.training.merge_loss import merge_loss
from qtrain.training.reference import Reference
from qtrain.training.run_directory import RunDirectory
from qtrain.training.streamed import StreamedRun
from qtrain.training.tracking import close, export_loggers
from qtrain.training.verify_run import check_written, judge, loaded_export

CARD_TAG = "\n- qtrain\n"
"""In the model card of every export."""


def export_run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write ``export.format`` to ``export.dir`` (default RUN/export/FORMAT); the facts, as export.json holds them.

    ``export.verify`` then reads it back and compares it with the trained model; ``export.evaluate`` also runs it.

    Raises:
        ExportError: the directory holds something that is no export.
        ErrorList: what was written is not what was trained. It stays there to be looked at, and export.json says so.
    """
    options = config.export
    directory = Path(options.dir) if options.dir else run.export(options.format)
    _check_target(directory, config)
    reference = _unrun(config, run) or Reference.of(config, run)
    facts = _facts(config, run, reference.lines())
    write = resolve(options.implementation)
    verdict: Verdict | None = None
    if options.takes == "trained":
        assert isinstance(reference, Reference)
        if not isinstance(reference.model, PeftModel):
            raise ExportError(
                f"export.format={options.format} writes PEFT's adapters, and method.name={config.method.name} has none",
                rule="an adapter is what method.name=qlora trains",
                fix="export.format=compressed-tensors",
            )
        tokenizer = reference.module.tokenizer
        found: dict[str, Any] = write(reference.model, directory, tokenizer, facts)
        if reference.module.method.keeps_base:
            reason = reference.module.method.why_no_original()
            found["notes"].append(f"it was trained over the codes in {run.base}" + (f": {reason}" if reason else ""))
        if options.verify:
            verdict = check_adapter(directory, reference.model, tokenizer)
    else:
        found, verdict = _deploy(reference, write, run, directory, facts)
    found["directory"] = str(directory)
    if verdict is not None:
        found["verified"] = verdict.to_dict()
    _record(run, options.format, found)
    write_report(run.path)
    if verdict is not None and not verdict.passed:
        raise ErrorList(verdict.failures_with("run the export again; if it fails again, this is a defect of qtrain"))
    if config.wandb.enabled and config.wandb.artifacts:
        opened, name = export_loggers(config, run, options.format)
        log_export(config, opened, run.trained, name, _fingerprint(config), found)
        close(opened)
    return found


def _unrun(config: Config, run: RunDirectory) -> StreamedRun | None:
    """The run from its files, a layer at a time, where no text is run through it: not to calibrate, nor to measure."""
    options = config.export
    if options.evaluate or not options.streams:
        return None
    base = getattr(options, "base", "dequantized")
    streamed = StreamedRun.of(config, run, [base])
    calibrates = getattr(options, "calibration_rows", 0) > 0
    return None if streamed is None or (calibrates and not streamed.deployed(base).trained_codes) else streamed


def _deploy(
    reference: Reference | StreamedRun, write: Writer, run: RunDirectory, directory: Path, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], Verdict | None]:
    """Write the plain checkpoint, read it back and run it, as the options ask."""
    options = reference.config.export
    base = getattr(options, "base", "dequantized")
    deployed = reference.deployed(base)
    rows = 0 if deployed.trained_codes else getattr(options, "calibration_rows", 0)
    found = write(
        deployed,
        options,
        directory,
        tokenizer=reference.tokenizer,
        facts=facts,
        calibration=reference.calibration(rows) if isinstance(reference, Reference) else None,
        progress=progress_over("exporting"),
        resume=export_key(reference.config, run),
    )
    written = ExportLocation(options.format, directory, found)
    verdict = check_written(reference, written, deployed) if options.verify else None
    if verdict is not None and verdict.lossy:
        found["sha256"] = digests(directory)
    note = None
    if isinstance(reference, Reference) and options.evaluate:
        with reference.context():
            loaded = loaded_export(reference, written)
            found |= {"measured_in": loaded.by.name, **reference.drift(loaded.model).to_dict()}
            if verdict is not None:
                judge(verdict, reference, loaded, found, deployed, {})
            note = loaded.note
            del loaded
            if hasattr(options, "base") and reference.module.method.why_no_original() is None:
                found["alternative"] = _alternative(reference, base)
    if lost := merge_loss(deployed, found, getattr(reference.config.method, "base", "none")):
        found["notes"].append(lost)
        if "candidate_perplexity" in found:
            found["merge_loss"] = found["candidate_perplexity"] / found["reference_perplexity"] - 1
    if options.evaluate:
        write_card(directory, {**facts, "figures": _figures(found)}, found)
    if note is not None:  # of this machine, so not for the card
        found["notes"].append(note)
    return found, verdict


def _alternative(reference: Reference, base: str) -> dict[str, Any]:
    """The drift of merging into the other base: dequantized, which was trained on, or original."""
    other = "original" if base == "dequantized" else "dequantized"
    candidate = load_model(reference.config.model, reference.storage, device=reference.device)
    with torch.no_grad():
        parameters = dict(candidate.named_parameters())
        for tensor in reference.deployed(other).tensors():
            if tensor.name in parameters:
                parameters[tensor.name].copy_(tensor.value())
    found = reference.drift(candidate)
    return {"base": other, "kl": found.kl, "top1": found.top1, "candidate_perplexity": found.candidate_perplexity}


def _facts(config: Config, run: RunDirectory, done: list[str]) -> dict[str, Any]:
    fit = read_json(run.result("fit")) if run.result("fit").exists() else {}
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


def _check_target(directory: Path, config: Config) -> None:
    """An export replaces an export of qtrain, which its model card tells; nothing else, and not what is exported."""
    if reason := unreachable(directory) or _in_the_way(directory, config):
        raise ExportError(
            reason,
            where=str(directory)[:100],
            rule="an export replaces an earlier export alone",
            fix="export.dir=ANOTHER",
        )


def _in_the_way(directory: Path, config: Config) -> str | None:
    if not directory.is_dir():
        return "a file lies there" if directory.exists() else None
    if config.model.path and directory.resolve() == Path(config.model.path).expanduser().resolve():
        return "it is model.path"
    card = directory / "README.md"
    ours = card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace")
    return "the directory holds something else" if any(directory.iterdir()) and not ours else None


def _fingerprint(config: Config) -> str | None:
    return fingerprint(find_model(config.model), config.model.revision) if config.model.path else None


def _record(run: RunDirectory, export_format: str, found: dict[str, Any]) -> None:
    path = run.result("export")
    known = read_json(path) if path.exists() else {}
    write_json(path, known | {export_format: found})
