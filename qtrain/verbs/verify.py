"""`qtrain verify`"""

from __future__ import annotations

from qtrain.console import say, table
from qtrain.errors import ErrorList
from qtrain.export.verify.verdict import Verdict
from qtrain.training.verify_run import verify_run
from qtrain.verbs.request import Request


def run(request: Request) -> None:
    """Verify, show one table of all exports, then fail with everything that is wrong."""
    verdicts = verify_run(request.config, request.run, request.exports)
    show(verdicts)
    failures = [
        failure
        for it in verdicts
        for failure in it.failures_with(f"qtrain export run.dir={request.run.path} export.format={it.format}")
    ]
    if failures:
        raise ErrorList(failures)
    say(f"\n{request.run.result('verify')}: what was trained is what is there")


def show(verdicts: list[Verdict]) -> None:
    """A row for each thing that was looked at, a column for each export."""
    rows = [row for row in LABELS if any(row in it.cells for it in verdicts)]
    table(
        "verified against the run",
        ("", *(it.format for it in verdicts)),
        [(LABELS[row], *(it.cells.get(row, "-") for it in verdicts)) for row in rows],
    )
    for it in verdicts:
        for note in it.notes:
            say(f"{it.format}: {note}")


LABELS = {
    "files": "files",
    "names": "names of tensors",
    "layout": "bits, groups, inputs, ignored",
    "codes": "codes that differ",
    "scales": "scales that differ",
    "zero points": "zero points that differ",
    "tensors": "other tensors",
    "config": "config",
    "tokenizer": "tokenizer",
    "perplexity": "perplexity",
    "top-1": "same top token",
    "greedy": "greedy tokens",
}
