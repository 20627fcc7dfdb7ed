"""`qtrain generate-data`"""

from __future__ import annotations

from qtrain.console import say
from qtrain.training.generate_data import generate_data
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Write the shards, then show what kind of texts they hold."""
    directory, manifest = generate_data(request.config, request.run)
    found = manifest.statistics
    facts = {
        "tokens": f"{found['tokens']:,} in {found['rows']:,} rows, {len(manifest.shards)} files",
        "distinct": ", ".join(f"{found[f'distinct_{n}']:.4f}" for n in (1, 2, 3)) + " of 1-, 2- and 3-grams",
        "vocabulary": f"{found['vocabulary_used']:.1%} of it occurs",
        "entropy": f"{found['entropy']:.2f} nats a sampled token" if "entropy" in found else "no token was sampled",
        "repetitive": f"{found['repetitive']:.2%} of the rows are to a quarter one 8-gram",
        "duplicates": f"{found['duplicates']:,} rows",
        "ended": f"{found['ended']:.1%} of the rows hold an end of text",
    }
    say((f"{name:<12}{value}" for name, value in facts.items()), title=f"generated: {directory}")
    say(f"\nnext: qtrain fit model.path={manifest.model_path} data.train={directory}")
