"""Curves of several runs in one drawing: runs that count the same thing share an axis, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qtrain.report.compared import ComparedRun
from qtrain.report.plots import SMALL, WIDE, Curve, curves, smoothed
from qtrain.report.run_files import Series
from qtrain.report.sections import Plot

HIGH = (WIDE[0], 5.2)
"""Many lines need more room than two."""
SMOOTHED_FROM = 30
"""Points of a training loss; a shorter one is drawn as it is."""


def overlays(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Losses of language models and of classifiers, losses against a teacher, accuracies; those that there are."""
    return [plot for plot in _overlays(runs) if plot is not None]


def _overlays(runs: Sequence[ComparedRun]) -> Iterator[Plot | None]:
    for images, unit in ((False, "nats a token"), (True, "nats an image")):
        group = [run for run in runs if run.images == images]
        alone = [run for run in group if run.files.teacher is None]
        yield _plot("Loss", unit, [*_train(alone), *_held_out(group, "val/loss")])
    for teacher in sorted({run.files.teacher for run in runs if run.files.teacher}):
        group = [run for run in runs if run.files.teacher == teacher]
        yield _plot(f"Training loss, {teacher.replace('_', ' ')} from the teacher", "nats a token", [*_train(group)])
    yield _plot("Held-out accuracy", "", [*_held_out(runs, "val/accuracy")])


def _train(runs: Iterable[ComparedRun]) -> Iterator[Curve]:
    for run in runs:
        if series := run.files.metrics.get("train/loss"):
            yield Curve(_smooth(series), run.colour, dashes=run.dashes, width=1.2, alpha=0.6)


def _held_out(runs: Iterable[ComparedRun], name: str) -> Iterator[Curve]:
    for run in runs:
        if series := run.files.metrics.get(name):
            yield Curve(series, run.colour, dots=len(series) <= 30, dashes=run.dashes)


def _smooth(series: Series) -> Series:
    if len(series) < SMOOTHED_FROM:
        return series
    return list(zip((step for step, _ in series), smoothed([value for _, value in series]), strict=True))


def _plot(title: str, unit: str, lines: Sequence[Curve]) -> Plot | None:
    if not lines:
        return None
    wide, narrow = (curves(title.lower(), unit, lines, size) for size in (HIGH, SMALL))
    return Plot(title, wide, narrow)
