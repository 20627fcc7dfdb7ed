"""`qtrain export`"""

from __future__ import annotations

from typing import Any

from qtrain.console import say, table
from qtrain.files import read_json
from qtrain.training.export_run import export_run
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Export, then show what was written and how far it is from the trained model."""
    found = export_run(request.config, request.run)
    facts = {"directory": found["directory"], "size": f"{found['bytes'] / 1e6:.1f} MB, {found['seconds']:.0f} s"}
    if "bits_per_quantized_weight" in found:
        facts["bits"] = f"{found['bits_per_quantized_weight']:.2f} a weight in {found['quantized_layers']} layers"
    if counts := found.get("verified", {}).get("counts"):
        words = (
            f"{its['differing']:,} of {its['compared']:,} {kind}" for kind, its in counts.items() if its["compared"]
        )
        facts["differing"] = ", ".join(words) or "what is not quantized is equal bit by bit"
    say([f"{name:<12}{value}" for name, value in facts.items()], title=f"exported: {request.config.export.format}")
    for note in found.get("notes", []):
        say(f"{'note':<12}{note}")
    if "kl" in found:
        table("held-out text", ("", "perplexity", "KL, nats", "same top token"), _rows(request, found))


def _rows(request: Request, found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [("trained", f"{found['reference_perplexity']:.3f}", "", "")]
    fit = request.run.result("fit")
    before = read_json(fit).get("val_perplexity_before") if fit.exists() else None
    if before is not None:
        rows.insert(0, ("before training, whole set", f"{before:.3f}", "", ""))
    rows.append(("exported", f"{found['candidate_perplexity']:.3f}", f"{found['kl']:.2e}", f"{found['top1']:.2%}"))
    other = found.get("alternative")
    if other:
        name = f"into the {other['base']} base"
        rows.append((name, f"{other['candidate_perplexity']:.3f}", f"{other['kl']:.2e}", f"{other['top1']:.2%}"))
    return rows
