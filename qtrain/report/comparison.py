"""Tables of several runs; a figure that a run does not have is a dash."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtrain.evaluation.recovery import recovery_of
from qtrain.report.compared import ComparedRun
from qtrain.report.figures import readable, size
from qtrain.report.sections import EXPORT_COLUMNS, exports

NONE = "–"
OTHER_TEXT = "Measured on different text, or in windows of different length: compare within a row, not between rows."
OTHER_IMAGES = "Measured on different images: compare within a row, not between rows."
Cells = Callable[[ComparedRun], Mapping[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of figures, each of one run; ``note`` stands below."""

    title: str
    columns: list[str]
    rows: list[tuple[ComparedRun, list[str]]]
    lead: str = ""
    note: str = ""
    words: frozenset[str] = field(default_factory=frozenset)


def tables(runs: Sequence[ComparedRun]) -> list[Table]:
    """Quality of language models and of classifiers, cost, exports; those that have a figure."""
    language, images = ([run for run in runs if run.images == kind] for kind in (False, True))
    found = [
        _table("Perplexity, held-out text", language, _perplexities, note=OTHER_TEXT if _differ(language) else ""),
        _table("Accuracy, test images", images, _accuracies, note=OTHER_IMAGES if _differ(images) else ""),
        _table(
            "Speed, memory and size",
            runs,
            _cost,
            lead="Medians over the run; wall time is that of the process that finished it.",
        ),
        _exports(runs),
    ]
    return [table for table in found if table is not None]


def _table(title: str, runs: Iterable[ComparedRun], cells: Cells, lead: str = "", note: str = "") -> Table | None:
    """Columns that no run has a figure in are left out."""
    rows = [(run, cells(run)) for run in runs]
    columns = [name for name in (rows[0][1] if rows else {}) if any(found[name] != NONE for _, found in rows)]
    if not columns:
        return None
    return Table(title, columns, [(run, [found[name] for name in columns]) for run, found in rows], lead, note)


def _perplexities(run: ComparedRun) -> dict[str, str]:
    fit, quantize = run.files.fit, run.files.quantize
    recovery = recovery_of(fit)
    full, ptq = (recovery.full, recovery.ptq) if recovery else (None, None)
    return {
        "full precision": _perplexity(quantize.get("perplexity_full", full)),
        "PTQ": _perplexity(quantize.get("perplexity_quantized", ptq)),
        "before training": _perplexity(fit.get("val_perplexity_before")),
        "trained": _perplexity(fit.get("val_perplexity_after")),
        "share recovered": _share(recovery.share if recovery else None),
        "lost by merging": _merge_loss(run),
    }


def _accuracies(run: ComparedRun) -> dict[str, str]:
    fit = run.files.fit
    recovery = recovery_of(fit)
    full, ptq = (recovery.full, recovery.ptq) if recovery else (None, None)
    return {
        "full precision": _percent(full),
        "PTQ": _percent(ptq),
        "trained": _percent(fit.get("test_accuracy")),
        "share recovered": _share(recovery.share if recovery else None),
        "held-out images": _percent(fit.get("val_accuracy")),
    }


def _cost(run: ComparedRun) -> dict[str, str]:
    fit, sizes = run.files.fit, run.files.sizes
    steps = fit.get("steps")
    trained = {name: size(count) for name, count in sizes.items() if name != "base"}
    return {
        "steps": readable(steps),
        "tokens/s": _rate(run, "tokens"),
        "images/s": _rate(run, "images", "samples"),
        "a step": readable(_median(run, "step_seconds"), "seconds"),
        "peak memory": _peak(run),
        "wall time": readable(fit.get("seconds", run.files.quantize.get("seconds")), "seconds"),
        "trained part": ", ".join(f"{name} {count}" for name, count in trained.items()) or NONE,
        "packed base": size(sizes["base"]) if "base" in sizes else NONE,
    }


def _exports(runs: Sequence[ComparedRun]) -> Table | None:
    rows = [(run, export.cells) for run in runs for export in exports(run.files)]
    if not rows:
        return None
    lead = "Against the trained model of the same run, on held-out text."
    return Table("Exports", EXPORT_COLUMNS, rows, lead, words=frozenset({"format"}))


def _differ(runs: Sequence[ComparedRun]) -> bool:
    """Whether runs that have figures measured them on other data, or on more or less of it."""
    measured = [run for run in runs if run.finished and run.files.data]
    return len({str(_held_out(run)) for run in measured}) > 1


def _held_out(run: ComparedRun) -> list[Any]:
    if run.images:
        keys = ("path", "validation_share")
        return [run.files.data.get("test", {}).get("samples"), *(run.setting("data", key) for key in keys)]
    facts = run.files.data.get("validation", {})
    settings = [run.setting("data", key) for key in ("validation", "max_length", "packing")]
    return [*settings, run.setting("trainer", "limit_val_batches"), facts.get("loss_tokens"), facts.get("tokens")]


def _merge_loss(run: ComparedRun) -> str:
    found = {name: facts["merge_loss"] for name, facts in run.files.exports.items() if "merge_loss" in facts}
    if len(found) == 1:
        return _change(*found.values())
    return "\n".join(f"{name} {_change(value)}" for name, value in found.items()) or NONE


def _median(run: ComparedRun, figure: str) -> float | None:
    if run.files.fit.get(figure) is not None:
        return float(run.files.fit[figure])
    measured = [value for _, value in run.files.metrics.get(f"throughput/{figure}", [])]
    return statistics.median(measured) if measured else None


def _rate(run: ComparedRun, unit: str, logged: str | None = None) -> str:
    if run.images != (unit == "images"):
        return NONE
    rate = run.files.fit.get(f"{unit}_per_second") or _median(run, f"{logged or unit}_per_second")
    return readable(rate, "per_second")


def _peak(run: ComparedRun) -> str:
    peaks = [value for _, value in run.files.metrics.get("throughput/peak_gib", [])]
    peak = run.files.fit.get("peak_gib") or (max(peaks) if peaks else None)
    return NONE if peak is None else f"{peak:.3g} GiB"


def _perplexity(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}" if value < 1000 else readable(float(value))


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2%}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}".replace("-", "−")


def _change(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")
