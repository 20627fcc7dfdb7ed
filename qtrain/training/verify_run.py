"""Exports of a run, each compared with the model that was trained and measured in the program that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from qtrain.config.schema import Config
from qtrain.errors import ModelError
from qtrain.evaluation.progress import progress_over
from qtrain.export.config import FORMATS
from qtrain.export.consumers import Loaded, load_export
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.adapter import check_adapter
from qtrain.export.verify.check import check_export
from qtrain.export.verify.consumer import judge_figures, judge_tokens
from qtrain.export.verify.files import changed_files
from qtrain.export.verify.verdict import Verdict
from qtrain.files import write_json
from qtrain.models.dtype import DTYPES
from qtrain.modules.deployed import DeployedModel
from qtrain.report.write import write_report
from qtrain.training.reference import Reference
from qtrain.training.run_directory import RunDirectory
from qtrain.training.streamed import StreamedRun

STORED = {"float32": "fp32", "bfloat16": "bf16"}


def verify_run(config: Config, run: RunDirectory, exports: Sequence[ExportLocation]) -> list[Verdict]:
    """Verify each export; RUN/verify.json holds what was found.

    ``config.export.evaluate`` false leaves out the part that runs the exports.
    """
    reference = _unrun(config, run, exports) or Reference.of(config, run)
    verdicts = [_verify(reference, export) for export in exports]
    write_json(run.result("verify"), verdicts_json(verdicts))
    write_report(run.path)
    return verdicts


def verdicts_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of verify.json."""
    return {"passed": all(it.passed for it in verdicts), "exports": [it.to_dict() for it in verdicts]}


def _unrun(config: Config, run: RunDirectory, exports: Sequence[ExportLocation]) -> StreamedRun | None:
    """The run from its files, where nothing is run and no format wants the model whole."""
    if config.export.evaluate or not all(FORMATS.get(export.format).streams for export in exports):
        return None
    return StreamedRun.of(config, run, {_base(export) for export in exports})


def _base(export: ExportLocation) -> str:
    return "original" if export.facts.get("base") == "original" else "dequantized"


def check_written(reference: Reference | StreamedRun, export: ExportLocation, deployed: DeployedModel) -> Verdict:
    """What the files of an export say, without running it."""
    verdict = check_export(export, deployed, reference.tokenizer, progress_over("verifying"))
    exact = torch.float32 if verdict.merged else reference.storage
    rounded = not deployed.trained_codes and deployed.dtype != exact
    if rounded or export.facts.get("base") == "original":
        verdict.as_trained = False
    if verdict.lossy and "sha256" in export.facts:
        verdict.found("files", changed_files(export.directory, export.facts["sha256"]))
    return verdict


def judge(
    verdict: Verdict,
    reference: Reference,
    loaded: Loaded,
    found: Mapping[str, Any],
    deployed: DeployedModel,
    recorded: Mapping[str, Any],
) -> None:
    """Add what a loaded export computes: the figures of its drift, and greedy tokens."""
    bytes_too = getattr(reference.module.method.options, "kernels", None) == "int8"
    ties = not loaded.by.breaks_ties_alike(verdict.conventions, bytes_too)
    fp32 = loaded.by.fp32 and {reference.compute, reference.storage, deployed.dtype} == {torch.float32} and not ties
    verdict.cells["by"] = loaded.by.name
    if loaded.note:
        verdict.notes.append(loaded.note)
    judge_figures(verdict, found, fp32, recorded, ties=ties)
    judge_tokens(verdict, reference.continuation(loaded.model), reference.continuation(reference.plain), fp32)


def loaded_export(reference: Reference, export: ExportLocation) -> Loaded:
    """The export as its consumer loads it, with what that switches on at run time.

    Raises:
        ModelError: it cannot be loaded.
    """
    loaded = load_export(export.format, export.directory, reference.storage, device=reference.device)
    reference.module.method.serve(reference.model, loaded.model)
    return loaded


def _verify(reference: Reference | StreamedRun, export: ExportLocation) -> Verdict:
    if FORMATS.get(export.format).takes == "trained":
        assert isinstance(reference, Reference) and isinstance(reference.model, PeftModel)
        return check_adapter(export.directory, reference.model, reference.module.tokenizer)
    deployed = reference.deployed(
        base=_base(export),
        dtype=DTYPES.get(STORED.get(export.facts.get("dtype", ""), "")),
    )
    verdict = check_written(reference, export, deployed)
    if isinstance(reference, Reference) and reference.config.export.evaluate:
        try:
            with reference.context():
                loaded = loaded_export(reference, export)
                found = reference.drift(loaded.model).to_dict()
                judge(verdict, reference, loaded, found, deployed, export.facts)
        except ModelError as error:
            verdict.found("perplexity", [error])
    return verdict
