"""A .gguf file: weights, architecture and vocabulary in one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.gguf.check import differences
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.verdict import Verdict
from qtrain.modules.deployed import DeployedModel


def check_gguf(export: ExportLocation, deployed: DeployedModel, tokenizer: PreTrainedTokenizerBase | None) -> Verdict:
    """What ``qtrain.export.gguf.check`` finds, by what it is about."""
    facts, verdict = export.facts, Verdict(export.format, export.directory)
    again = list(facts.get("lossy", ()))
    chosen = 0 if deployed.trained_codes else facts.get("quantized_layers", 0)
    if again or chosen:
        verdict.lossy = True
        verdict.notes.append(
            f"lossy, by design: the codes of {len(again) or chosen} layers were chosen when the file was written"
        )
    files = sorted(export.directory.glob("*.gguf"))
    if len(files) != 1:
        where, rule = str(export.directory), "an export is one file"
        verdict.found("files", [ExportError(f"{len(files)} .gguf files", where=where, rule=rule)])
        return verdict
    pre_tokenizer = facts.get("pre_tokenizer")
    try:
        found = list(differences(files[0], deployed, tokenizer, pre_tokenizer=pre_tokenizer, lossy=again))
    except ExportError as error:
        verdict.found("files", [error])
        return verdict
    tensors = {tensor.name: tensor for tensor in deployed.tensors()}
    coded = {name for name, tensor in tensors.items() if tensor.record is not None}
    about: dict[str, list[ExportError]] = {"files": [], "codes": [], "tensors": [], "config": [], "tokenizer": []}
    for difference in found:
        where = difference.where or ""
        if where in tensors:
            about["codes" if where in coded else "tensors"].append(difference)
        else:
            about["tokenizer" if where.startswith("tokenizer.") else "config"].append(difference)
    for what, errors in about.items():
        verdict.found(what, errors, "0" if what == "codes" and coded else "ok")
    if not coded:
        verdict.cells["codes"] = "lossy" if verdict.lossy else "-"
    return verdict
