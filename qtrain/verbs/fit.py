"""`qtrain fit`"""

from __future__ import annotations

from typing import Any

from qtrain.console import hush_lightning, say, table
from qtrain.training.fit import fit
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Train, then show the figures and where everything lies."""
    hush_lightning()
    figures = fit(request.config, request.run)
    if "val_loss_after" in figures:
        table("held-out text", ("", "loss", "perplexity"), list(_held_out(figures)))
    facts = {
        "steps": f"{figures['steps']}, {figures['train_seconds']:.0f} s",
        "speed": f"{figures['tokens_per_second']:,.0f} tokens/s"
        if figures["tokens_per_second"]
        else "too short to measure",
        "memory": f"{figures['peak_gib']:.2f} GiB at its peak",
        "adapter": str(request.run.adapter),
        "report": str(request.run.path / "report.html"),
    }
    say((f"{name:<12}{value}" for name, value in facts.items()), title="done")
    say(f"\nnext: qtrain export run.dir={request.run.path}")


def _held_out(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name, key in (("before", "before"), ("after", "after")):
        if f"val_loss_{key}" in figures:
            rows.append((name, f"{figures[f'val_loss_{key}']:.4f}", f"{figures[f'val_perplexity_{key}']:.2f}"))
    return rows
