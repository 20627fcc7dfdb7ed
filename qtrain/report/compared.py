"""Several runs side by side: which they are, what they are called, and which colour each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.errors import CheckpointError, ErrorList, QtrainError
from qtrain.paths import unreachable
from qtrain.report.plots import run_colour
from qtrain.report.run_files import RunFiles, read_run

COLOURS = 8
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.5), (1.5, 2.0))
"""The same colours again are told apart by their dashes."""
MOST = COLOURS * len(DASHES)
RULE = "a run directory holds config.yaml, as `qtrain fit` and `qtrain quantize` write it"


@dataclass(frozen=True)
class ComparedRun:
    """One run of several.

    Attributes:
        label: the directory's name, with those above it as far as another run has the same.
        at: its place among the runs.
        settings: the content of config.yaml.
    """

    label: str
    at: int
    files: RunFiles
    settings: dict[str, Any]

    @property
    def colour(self) -> str:
        """Of its lines."""
        return run_colour(self.at % COLOURS)

    @property
    def dashes(self) -> tuple[float, ...]:
        """Of its lines."""
        return DASHES[self.at // COLOURS]

    @property
    def key(self) -> str:
        """Classes of the mark beside its name."""
        return f"run-{self.at % COLOURS} dash-{self.at // COLOURS}"

    @property
    def finished(self) -> bool:
        """`fit` or `quantize` came to its end."""
        return bool(self.files.fit or self.files.quantize)

    @property
    def state(self) -> str:
        """Finished, or how far the curves go."""
        if self.finished:
            return "finished"
        steps = [step for name, series in self.files.metrics.items() if name.startswith("train/") for step, _ in series]
        goal = self.setting("trainer", "max_steps")
        of = f" of {goal:,}" if isinstance(goal, int) and goal > 0 else ""
        return f"not finished: {max(steps) + 1:,}{of} steps logged" if steps else "not finished: no step logged"

    @property
    def images(self) -> bool:
        """An image classifier; else a language model."""
        return bool(self.settings.get("task") == "vision")

    def setting(self, section: str, key: str) -> Any:
        """A value of the config; None where there is none."""
        values = self.settings.get(section)
        return values.get(key) if isinstance(values, dict) else None


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """The runs in the order in which they were named.

    Raises:
        ErrorList: directories that hold no run or a broken one, or that were named twice; all of them.
    """
    errors: list[QtrainError] = []
    if len(directories) > MOST:
        rule = f"one page tells up to {MOST} runs apart"
        errors.append(CheckpointError(f"{len(directories)} runs", rule=rule, fix="fewer of them, or several pages"))
    seen: dict[Path, Path] = {}
    found: list[tuple[Path, RunFiles, dict[str, Any]]] = []
    for directory in directories:
        try:
            require_run(directory)
            place = directory.resolve()
            if place in seen:
                raise CheckpointError(
                    "the same run twice", where=str(directory), rule="each run stands there once", fix="name it once"
                )
            seen[place] = directory
            run = read_run(directory)
            found.append((place, run, run.settings))
        except QtrainError as error:
            errors.append(error)
    if errors:
        raise ErrorList(errors)
    labels = _labels([place for place, _, _ in found])
    return [
        ComparedRun(label, at, run, settings)
        for at, (label, (_, run, settings)) in enumerate(zip(labels, found, strict=True))
    ]


def require_run(directory: Path) -> None:
    """Look for config.yaml.

    Raises:
        CheckpointError: this is no directory of a run.
    """
    where = str(directory)[:100]
    if unreachable(directory) or not directory.exists():
        raise CheckpointError("no such run directory", where=where, rule=RULE, fix=_runs_near(directory))
    if not directory.is_dir():
        raise CheckpointError(
            "a file, no run directory", where=where, rule=RULE, fix=f"{directory.parent}/*/ names directories alone"
        )
    if not (directory / "config.yaml").is_file():
        inside = f"{where}/*/" if any(directory.glob("*/config.yaml")) else _runs_near(directory)
        raise CheckpointError("no run lies here", where=where, rule=RULE, fix=inside)


def _runs_near(directory: Path) -> str:
    near = [] if unreachable(directory) else sorted(path.parent.name for path in directory.parent.glob("*/config.yaml"))
    return f"runs in {directory.parent}: " + ", ".join(near[:8]) if near else "qtrain fit run.name=NAME makes one"


def _labels(places: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other has."""
    labels = []
    for place in places:
        others = [other for other in places if other != place]
        count = next(
            (n for n in range(1, len(place.parts)) if all(other.parts[-n:] != place.parts[-n:] for other in others)),
            len(place.parts),
        )
        labels.append("/".join(place.parts[-count:]))
    return labels
