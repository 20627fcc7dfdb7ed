"""What a run directory holds, as far as it is there."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qtrain.errors import CheckpointError

Series = list[tuple[int, float]]
"""(optimizer step, value), in the order of the file."""
RESULTS = ("adapter", "scales", "weights", "base")
"""Folders that a method leaves its trained part in, and the packed base."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is missing is empty.

    Args:
        name: the directory's name.
        config: text of config.yaml.
        metrics: a series for each column of metrics.csv.
        fit: figures of fit.json.
        data: split to summary, of data.json.
        samples: ``{step, prompt, text}`` of samples.jsonl.
        exports: format to figures, of export.json.
        diagnostics: diagnostic to layer to its series, of diagnostics.csv.
        quantize: figures of quantize.json.
        sizes: bytes of each folder that holds the result.
    """

    name: str
    config: str
    metrics: dict[str, Series]
    fit: dict[str, Any]
    data: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    exports: dict[str, dict[str, Any]]
    diagnostics: dict[str, dict[str, Series]] = field(default_factory=dict)
    quantize: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config.yaml; empty where it holds no sections.

        Raises:
            CheckpointError: it is no YAML.
        """
        try:
            content = yaml.safe_load(self.config) if self.config else None
        except yaml.YAMLError as error:
            raise CheckpointError(
                "no YAML: " + " ".join(str(error).split()),
                where=f"config.yaml of {self.name}",
                rule="config.yaml is the resolved config, as qtrain wrote it",
                fix="restore it, or leave the run out",
            ) from None
        return content if isinstance(content, dict) else {}

    @property
    def teacher(self) -> str | None:
        """The divergence that the training loss is; None where it is that of the data's tokens."""
        section = self.settings.get("distill")
        loss = section.get("loss") if isinstance(section, dict) else None
        return None if loss in (None, "none") else str(loss)


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is.

    Raises:
        CheckpointError: there is no such directory, or a file in it is not what its name says.
    """
    if not run_dir.is_dir():
        raise CheckpointError("no such run directory", where=str(run_dir), fix="run.dir=DIR of a run that `fit` wrote")
    config, samples = run_dir / "config.yaml", run_dir / "samples.jsonl"
    return RunFiles(
        name=run_dir.resolve().name,
        config=_text(config) if config.exists() else "",
        metrics=_metrics(run_dir / "metrics.csv"),
        fit=_json(run_dir / "fit.json"),
        data=_by_name(_json(run_dir / "data.json"), "data"),
        samples=[_parsed(line, samples) for line in _text(samples).split("\n") if line.strip()]
        if samples.exists()
        else [],
        exports=_exports(_json(run_dir / "export.json")),
        diagnostics=_diagnostics(run_dir / "diagnostics.csv"),
        quantize=_json(run_dir / "quantize.json"),
        sizes={name: _size(run_dir / name) for name in RESULTS if (run_dir / name).is_dir()},
    )


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"no UTF-8: {error.reason}",
            where=str(path),
            rule="files of a run are text, as qtrain wrote them",
            fix=f"restore {path.name}, or leave the run out",
        ) from None


def _metrics(path: Path) -> dict[str, Series]:
    """Columns of a sparse table; cells that hold no finite number are skipped, like a row that was cut off."""
    series: dict[str, Series] = defaultdict(list)
    if not path.exists():
        return {}
    for row in csv.DictReader(_whole(io.StringIO(_text(path)))):
        step = _number(row.pop("step", None))
        for name, cell in row.items():
            value = _number(cell)
            if name and step is not None and value is not None:
                series[name].append((int(step), value))
    return dict(series)


def _diagnostics(path: Path) -> dict[str, dict[str, Series]]:
    """Rows of step, diagnostic, layer and value; those without a finite value are skipped."""
    found: dict[str, dict[str, Series]] = defaultdict(lambda: defaultdict(list))
    if not path.exists():
        return {}
    for row in csv.DictReader(_whole(io.StringIO(_text(path)))):
        step, value = _number(row.get("step")), _number(row.get("value"))
        if step is not None and value is not None:
            found[row["diagnostic"]][row["layer"]].append((int(step), value))
    return {name: dict(layers) for name, layers in found.items()}


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Without a last line that a killed process left half written, which may hold half a number."""
    return (line for line in lines if line.endswith("\n"))


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _json(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), path) if path.exists() else {}


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"no JSON: {error}", where=str(path), fix=f"remove {path.name}; the report leaves it out"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}", where=str(path), rule="an object with named figures")
    return content


def _exports(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of each format, those of a nested ``drift`` among them."""
    exports = _by_name(content, str(content.get("format", "export")))
    return {name: {**export, **export.get("drift", {})} for name, export in exports.items()}


def _by_name(content: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """``{name: figures}``; figures that stand alone get ``name``."""
    if not content:
        return {}
    if all(isinstance(value, dict) for value in content.values()):
        return content
    return {name: content}
