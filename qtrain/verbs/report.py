"""`qtrain report`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qtrain.console import say
from qtrain.errors import ConfigError
from qtrain.paths import unreachable
from qtrain.report.compared import require_run
from qtrain.report.config import ReportOptions
from qtrain.report.write import write_comparison, write_report


def run(words: Sequence[str], options: ReportOptions) -> None:
    """One run's page anew, or a page of several."""
    runs = [Path(word) for word in words]
    if not runs:
        raise ConfigError(
            "`qtrain report` names no run",
            rule="one run directory rebuilds its report.html, several are compared on one page",
            fix="qtrain report runs/A runs/B",
        )
    if len(runs) == 1:
        require_run(runs[0])
        path = write_report(runs[0], _free(Path(options.path), options.overwrite) if options.path else None)
    else:
        target = Path(options.path) if options.path else runs[0].parent / "comparison.html"
        path = write_comparison(runs, _free(target, options.overwrite))
    say(str(path))


def _free(path: Path, overwrite: bool) -> Path:
    where = str(path)[:100]
    if reason := unreachable(path) or ("a directory lies there" if path.is_dir() else None):
        raise ConfigError(f"report.path: {reason}", where=where, rule="a page is a file", fix="report.path=PAGE.html")
    if path.exists() and not overwrite:
        raise ConfigError(
            "a file lies there",
            where=where,
            rule="nothing is overwritten unless it is said",
            fix="report.overwrite=true, or report.path=OTHER.html",
        )
    return path
