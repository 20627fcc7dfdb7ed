"""`qtrain validate` and `qtrain test`"""

from __future__ import annotations

from typing import Any

import torch

from qtrain.console import table
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.held_out import held_out, limited
from qtrain.files import write_json
from qtrain.modules.token_loss import choose_loss
from qtrain.training.trained import Subject, stored_subject, trained_subject
from qtrain.verbs.request import Request


def validate(request: Request) -> None:
    """Measure on data.validation."""
    _measure(request, "validate", "limit_val_batches")


def test(request: Request) -> None:
    """Measure on data.test."""
    _measure(request, "test", "limit_test_batches")


def subject_of(request: Request) -> Subject:
    """The run's trained model, or model.path as it is stored."""
    return trained_subject(request.config, request.run) if request.trained else stored_subject(request.config)


def _measure(request: Request, verb: str, limit: str) -> None:
    config = request.config
    subject = subject_of(request)
    data = LanguageData(config.data, subject.tokenizer, seed=config.run.seed)
    data.setup(verb)
    loader = data.val_dataloader() if verb == "validate" else data.test_dataloader()
    with subject.forward_context(), torch.no_grad():
        loss, path = choose_loss(subject.plain)
        found = held_out(loss, limited(loader, config.trainer.get(limit)), next(subject.model.parameters()).device)
    figures: dict[str, Any] = {"model": subject.name, **found.to_dict(), "loss_path": path}
    write_json(request.run.result(verb), figures)
    row = (subject.name, f"{found.perplexity:.3f}", f"{found.loss:.4f}", f"{found.tokens:,}")
    table(verb, ("model", "perplexity", "loss", "tokens"), [row])
