"""`qtrain fit`"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qtrain.console import hush_lightning, say, table
from qtrain.errors import ConfigError
from qtrain.evaluation.recovery import recovery_of
from qtrain.registry import resolve
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Train, then show the figures and where everything lies."""
    if not request.config.method.trains:
        raise ConfigError(
            f"method.name={request.config.method.name} trains nothing",
            rule="`qtrain fit` trains adapters, weights or scales",
            fix="qtrain quantize, or method.name=peqa to train the scales",
        )
    fit = resolve(request.config.implementation)
    hush_lightning()
    figures = fit(request.config, request.run)
    if "val_loss_after" in figures:
        table("held-out text", ("", "loss", "perplexity"), list(_held_out(figures)))
    if "test_accuracy" in figures:
        table("images", ("", "loss", "accuracy"), list(_accuracies(figures)))
    if recovery := recovery_of(figures):
        table("quantization", ("", recovery.measure), recovery.rows())
        if recovery.note:
            say(recovery.note)
    result = request.run.trained or request.run.path
    facts = {
        "steps": f"{figures['steps']}, {figures['train_seconds']:.0f} s",
        "speed": _speed(figures),
        **({"memory": f"{figures['peak_gib']:.2f} GiB at its peak"} if figures["peak_gib"] is not None else {}),
        result.name: str(result),
        "report": str(request.run.path / "report.html"),
    }
    say((f"{name:<12}{value}" for name, value in facts.items()), title="done")
    if request.config.task == "language":
        say(f"\nnext: qtrain export run.dir={request.run.path}")


def _held_out(figures: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for moment in ("before", "after"):
        if f"val_loss_{moment}" in figures:
            yield moment, f"{figures[f'val_loss_{moment}']:.4f}", f"{figures[f'val_perplexity_{moment}']:.2f}"


def _accuracies(figures: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, split in (("held out", "val"), ("test", "test")):
        if f"{split}_loss" in figures:
            yield name, f"{figures[f'{split}_loss']:.4f}", f"{figures[f'{split}_accuracy']:.2%}"


def _speed(figures: dict[str, Any]) -> str:
    for unit in ("tokens", "images"):
        if figures.get(f"{unit}_per_second"):
            return f"{figures[f'{unit}_per_second']:,.0f} {unit}/s"
    return "too short to measure"
