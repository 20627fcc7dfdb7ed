"""Everything about an export that its files and the run's model say, without running it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from qtrain.errors import QtrainError
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.bitsandbytes import check_bitsandbytes
from qtrain.export.verify.companions import config_problems, generation_problems, tokenizer_problems
from qtrain.export.verify.compare import compare
from qtrain.export.verify.count import KINDS, counted
from qtrain.export.verify.files import file_problems
from qtrain.export.verify.gguf import check_gguf
from qtrain.export.verify.stored import READERS
from qtrain.export.verify.verdict import Verdict
from qtrain.export.writer import Progress
from qtrain.models.quantized.skeleton import empty_model
from qtrain.modules.deployed import DeployedModel

NONE = "-"
LOSSY = "lossy"


WHOLE = {"gguf": check_gguf, "bitsandbytes": check_bitsandbytes}
"""Formats that are no plain directory of safetensors, or hold codes of another kind than records."""


def check_export(
    export: ExportLocation,
    deployed: DeployedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress | None = None,
) -> Verdict:
    """Read all of an export and compare it with the model that it was written from.

    Columns: files (whole, each tensor once, where the index says), names (of tensors, none missing or too many),
    layout (bits, groups, inputs, targets and ignore list of the header), codes, scales, zero points (how many differ:
    0 or a failure), tensors (all others, bit by bit), config, tokenizer.
    """
    if export.format in WHOLE:
        return WHOLE[export.format](export, deployed, tokenizer)
    verdict = Verdict(export.format, export.directory)
    if export.format not in READERS.names():
        verdict.notes.append(f"{export.format} is not read back: its consumer alone is asked")
        return verdict
    verdict.found("files", file_problems(export.directory))
    _compare(verdict, deployed, progress)
    problems = [*config_problems(export.directory, deployed.config, deployed.dtype)]
    verdict.found("config", [*problems, *generation_problems(export.directory, deployed.generation_config)])
    if tokenizer is not None:
        verdict.found("tokenizer", tokenizer_problems(export.directory, tokenizer))
    return verdict


def _compare(verdict: Verdict, deployed: DeployedModel, progress: Progress | None) -> None:
    columns = ("names", "layout", *KINDS, "tensors")
    model = empty_model(deployed.config, deployed.dtype)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        stored = READERS.get(verdict.format)(verdict.directory, linears)
        result = compare(stored, deployed, progress)
    except QtrainError as error:
        verdict.cells |= dict.fromkeys(columns, NONE)
        if verdict.passed:  # else it stumbled over the files that were told already
            verdict.found("layout", [error])
        return
    verdict.lossy, verdict.as_trained = bool(result.lossy), not result.other_inputs
    verdict.conventions = frozenset(result.conventions)
    verdict.found("names", result.names)
    verdict.found("layout", result.layout)
    for kind, count in result.counts.items():
        verdict.found(kind, count.problems(kind), "0" if count.compared else LOSSY if result.lossy else NONE)
        if count.differing:
            verdict.cells[kind] = f"{count.differing:,}"
    verdict.found("tensors", result.wrong)
    verdict.figures |= {"counts": counted(result.counts), "equal_tensors": result.tensors}
    if result.other_inputs:
        verdict.notes.append(
            f"inputs of {result.other_inputs} layers were quantized in training and are not, or by another rule, in "
            "what runs it here: its perplexity is another one"
        )
    if result.lossy:
        verdict.notes.append(
            f"lossy, by design: the codes of {result.lossy} layers were chosen when the merged model was written"
        )
