"""A finished run's model, and any other model, ready to answer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtrain.config.schema import Config
from qtrain.distill.config import DistillSection
from qtrain.evaluation.progress import progress_over
from qtrain.export.bitsandbytes.load import with_adapter
from qtrain.methods.method import build_method
from qtrain.models.dtype import resolve_dtypes
from qtrain.models.load import load_model, load_tokenizer
from qtrain.models.source import find_model
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Subject:
    """A model to measure or to ask.

    Attributes:
        model: as it answers: for a run, base and adapter as they were trained.
        plain: the transformers model inside.
        name: what it is called in results.
        compute: dtype of its products.
    """

    model: nn.Module
    plain: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    compute: torch.dtype

    def forward_context(self) -> AbstractContextManager[None]:
        """The autocast that it was trained under."""
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16)


def best_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def trained_module(config: Config, run: RunDirectory, device: torch.device) -> LanguageModule:
    """The run's model with what was trained, as the last training step left it, in eval mode."""
    # What answers needs no teacher, and nothing to be measured for a backward.
    run_section = config.run.model_copy(update={"recompute": "none"})
    untaught = config.model_copy(update={"distill": DistillSection(), "run": run_section})
    packed = run.kept_base() if build_method(config.method).keeps_base else None
    module = LanguageModule(untaught, progress=progress_over("quantizing"), packed=packed, restoring=True)
    model = module.build(device)
    assert run.trained is not None  # verbs on a finished run look first
    module.method.restore(model, run.trained)
    model.eval()
    return module


def trained_subject(config: Config, run: RunDirectory) -> Subject:
    """The run's model as a subject."""
    device = best_device()
    module = trained_module(config, run, device)
    assert module.model is not None
    _, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
    return Subject(module.model, module.method.plain_model(module.model), module.tokenizer, str(run.path), compute)


def stored_subject(config: Config) -> Subject:
    """``model.path`` as it is stored: an export is unpacked by transformers, and has its adapter if one lies in it."""
    device = best_device()
    storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
    model = load_model(config.model, storage, device=device)
    source = find_model(config.model)
    if source.kind == "directory":
        model = with_adapter(model, Path(source.location))
    return Subject(model, model, load_tokenizer(config.model), str(config.model.path), compute)
