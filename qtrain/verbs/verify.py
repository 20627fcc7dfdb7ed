"""`qtrain verify`"""

from __future__ import annotations

from qtrain.console import say
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
    """A row for each thing that was looked at, a column for each export; never cut to the terminal's width."""
    rows = [row for row in LABELS if any(row in it.cells for it in verdicts)]
    columns = [[it.format, *(it.cells.get(row, "-") for row in rows)] for it in verdicts]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        f"{label:<22}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, *cells in zip(["", *(LABELS[row] for row in rows)], *columns, strict=True)
    ]
    say(lines, title="verified against the run")
    if len({it.format for it in verdicts}) < len(verdicts):
        say("these lie in " + ", ".join(str(it.directory) for it in verdicts))
    for it in verdicts:
        for note in it.notes:
            say(f"{it.format}: {note}")


LABELS = {
    "files": "files",
    "names": "names of tensors",
    "layout": "header",
    "codes": "codes differing",
    "scales": "scales differing",
    "zero points": "zero points differing",
    "tensors": "other tensors",
    "adapter": "adapter",
    "config": "config",
    "tokenizer": "tokenizer",
    "by": "run by",
    "perplexity": "perplexity",
    "top-1": "same top token",
    "greedy": "greedy tokens equal",
}
"""What was looked at, in the order of the table, and in words."""
