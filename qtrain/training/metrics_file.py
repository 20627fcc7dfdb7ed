"""`metrics.csv`: one row for each time something was logged."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qtrain.files import atomic_file
from qtrain.storage import told

Row = dict[str, Any]


class MetricsFile(Logger):
    """A Lightning logger that writes exactly one CSV file and goes on with it after a resume.

    Lightning's CSVLogger deletes an existing file, warns about every directory that is not empty and rewrites the
    file in place when a column appears. Here that rewrite is atomic; rows with known columns are appended.

    Args:
        path: the file; its columns are ``step`` (0 is the first optimizer step), then in order of appearance.
        keep_below: rows that an earlier process left stay if their step is below this. 0 starts anew; None is the
            step of the first row logged here: from there on a resumed run repeats what the killed one wrote.
        last_row: the row of the last of these steps, for a process that was killed after the checkpoint and before it.
    """

    def __init__(self, path: Path, keep_below: int | None = 0, last_row: Row | None = None) -> None:
        super().__init__()
        self.path, self._last_row = path, last_row
        self._keep_below = keep_below
        self._columns: list[str] = []  # empty until this process has written
        self._pending: list[Row] = []
        self._step = 0

    @property
    def name(self) -> str:
        """Empty: the file lies in `save_dir` itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies in `save_dir` itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """The directory of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hold one row back for `save`, which the trainer calls after each of its rows."""
        self._step = self._step if step is None else step
        self._pending.append({"step": self._step} | {key: float(value) for key, value in metrics.items()})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the run directory has them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows held back."""
        if not self._pending:
            return
        with told(self.path):
            self._save()

    def _save(self) -> None:
        keys = dict.fromkeys(key for row in self._pending for key in row)
        if keys.keys() <= set(self._columns):
            _write(self.path, "a", self._columns, self._pending)
        else:
            rows = self._rows_to_keep()
            self._columns = list(dict.fromkeys([*(rows[0] if rows else ()), *keys]))
            with atomic_file(self.path) as temporary:
                _write(temporary, "w", self._columns, rows + self._pending)
        self._pending = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rows held back."""
        self.save()

    def _rows_to_keep(self) -> list[Row]:
        rows = _read(self.path)
        if self._columns:
            return rows
        keep_below = self._pending[0]["step"] if self._keep_below is None else self._keep_below
        kept = [row for row in rows if int(row["step"]) < keep_below]
        if self._last_row and not any(_same(row, self._last_row) for row in kept):
            kept.append(self._last_row)
        return kept


def _same(row: Row, other: Row) -> bool:
    return all(row.get(name) == str(value) for name, value in other.items())


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A process killed while it appended leaves half a line, which may hold half a number.
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def _write(path: Path, mode: str, columns: list[str], rows: Iterable[Row]) -> None:
    with path.open(mode, encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)
