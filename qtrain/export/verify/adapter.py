"""PEFT's adapters read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError
from qtrain.export.verify.companions import tokenizer_problems
from qtrain.export.verify.files import WHOLE
from qtrain.export.verify.verdict import Verdict

OF_THE_FILE = {"base_model_name_or_path", "inference_mode", "auto_mapping", "revision", "peft_version"}


def check_adapter(directory: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Compare adapter_model.safetensors, adapter_config.json and the tokenizer with the adapter that was trained."""
    verdict = Verdict("adapter", directory)
    look_at_adapter(verdict, directory, model)
    verdict.found("config", config_problems(directory, model))
    verdict.found("tokenizer", tokenizer_problems(directory, tokenizer))
    return verdict


def look_at_adapter(verdict: Verdict, directory: Path, model: PeftModel, column: str = "tensors") -> None:
    """Add what is found in adapter_model.safetensors.

    Args:
        column: of the verdict, for the tensors.
    """
    path = directory / "adapter_model.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        verdict.found("files", [ExportError(f"it cannot be read: {error}", where=str(path), rule=WHOLE)])
    else:
        verdict.found("files", [])
        verdict.found(column, tensor_problems(path, found, model))


def tensor_problems(path: Path, found: Mapping[str, Tensor], model: PeftModel) -> Iterator[ExportError]:
    """Tensors of an adapter against those that were trained."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(found.keys() | own.keys()):
        rule = "an adapter is written bit by bit"
        if name not in found or name not in own:
            what = "it is missing" if name in own else "no tensor of the adapter is called so"
            yield ExportError(what, where=f"{path}: {name}", rule=rule)
        elif found[name].dtype != own[name].dtype or not torch.equal(found[name], own[name].cpu()):
            yield ExportError("it differs from what was trained", where=f"{path}: {name}", rule=rule)


def config_problems(directory: Path, model: PeftModel) -> Iterator[ExportError]:
    """adapter_config.json against the adapter that was trained, but for where its base lay."""
    path = directory / "adapter_config.json"
    try:
        found = PeftConfig.from_pretrained(str(directory)).to_dict()
    except (OSError, ValueError, TypeError, KeyError) as error:
        yield ExportError(f"it cannot be read: {error}", where=str(path))
        return
    own = model.active_peft_config.to_dict()
    for key in sorted(own.keys() - OF_THE_FILE):
        one, other = (set(it[key]) if isinstance(it[key], list | set) else it[key] for it in (found, own))
        if one != other:
            yield ExportError(
                f"{key} is {one!r} there, {other!r} in the run",
                where=str(path),
                rule="PEFT builds the adapter that was trained",
            )
