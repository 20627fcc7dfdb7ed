"""`qtrain quantize`"""

from __future__ import annotations

from qtrain.console import hush_lightning, say, table
from qtrain.training.quantize_run import quantize_run
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Quantize, then show what it cost and where it lies."""
    hush_lightning()
    figures = quantize_run(request.config, request.run)
    full, quantized = figures["perplexity_full"], figures["perplexity_quantized"]
    if full is not None:
        rows = [
            ("full precision", f"{full:.3f}", ""),
            ("quantized", f"{quantized:.3f}", f"{quantized / full - 1:+.1%}"),
        ]
        table("held-out text", ("", "perplexity", ""), rows)
    facts = {
        "base": f"{request.run.base}, {figures['bytes'] / 1e6:,.1f} MB",
        "time": f"{figures['quantize_seconds']:.0f} s",
        "report": str(request.run.path / "report.html"),
    }
    say((f"{name:<12}{value}" for name, value in facts.items()), title="done")
    say(f"\nnext: qtrain export run.dir={request.run.path}")
