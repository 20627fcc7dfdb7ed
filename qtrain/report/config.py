"""Keys of `qtrain report`."""

from __future__ import annotations

from pydantic import Field

from qtrain.section import Section


class ReportOptions(Section):
    """Where the page goes."""

    path: str | None = Field(
        None, description="default: comparison.html beside the first run; of a single run, its own report.html"
    )
    overwrite: bool = Field(False, description="replace what lies at the path of a comparison")
