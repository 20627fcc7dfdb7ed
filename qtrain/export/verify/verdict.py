"""What was found out about one export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.errors import ExportError, QtrainError
from qtrain.numerics.spec import Convention

FAILED = "FAILED"


@dataclass
class Verdict:
    """One export and what was looked at.

    Attributes:
        format: its name in ``export.format``.
        lossy: its codes are not the training's: a merged model was quantized when it was written.
        as_trained: a consumer computes what the training graph does: it quantizes the same inputs, an adapter is merged
            into the base that it was trained on, and no merged weight was rounded.
        conventions: of the scales by token that inputs of layers are quantized with when it runs.
        merged: an adapter, if there was one, is in the weights, not beside them.
        cells: what was looked at, in the order of the table, and what was found in a word or a figure.
        failures: what must not be.
        notes: what is worth knowing.
        figures: measured numbers for verify.json.
    """

    format: str
    directory: Path
    lossy: bool = False
    as_trained: bool = True
    conventions: frozenset[Convention] = frozenset()
    merged: bool = True
    cells: dict[str, str] = field(default_factory=dict)
    failures: list[QtrainError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def found(self, what: str, failures: Iterable[QtrainError], right: str = "ok") -> bool:
        """Note what came of looking at ``what``; whether it is right."""
        failures = list(failures)
        failed = failures or self.cells.get(what) == FAILED
        self.cells[what] = FAILED if failed else right
        self.failures += failures
        return not failures

    def failures_with(self, remedy: str) -> list[QtrainError]:
        """The failures, ``remedy`` as the way out of those that know none."""
        return [
            failure if failure.fix else ExportError(failure.what, where=failure.where, rule=failure.rule, fix=remedy)
            for failure in self.failures
        ]

    def to_dict(self) -> dict[str, Any]:
        """As verify.json holds it."""
        return {
            "format": self.format,
            "directory": str(self.directory),
            "passed": self.passed,
            "lossy": self.lossy,
            "found": dict(self.cells),
            **self.figures,
            "failures": [
                {key: value for key in ("what", "where", "rule") if (value := getattr(failure, key)) is not None}
                for failure in self.failures
            ],
            "notes": list(self.notes),
        }
