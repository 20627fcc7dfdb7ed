"""A run's report.html, and a page of several runs: each needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qtrain.files import write_text
from qtrain.report import sections
from qtrain.report.compared import read_runs
from qtrain.report.comparison import tables
from qtrain.report.differing import differing_keys
from qtrain.report.figures import flat, headlines
from qtrain.report.overlay import overlays
from qtrain.report.quantization import quantization
from qtrain.report.run_files import read_run


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write ``run_dir/report.html``, or ``path``, from what lies there, and return its path; what is missing is left
    out.

    The same files give the same bytes. Texts of samples and data are escaped, and the page allows no script.

    Raises:
        CheckpointError: there is no such directory, or a file in it cannot be read.
    """
    run = read_run(run_dir)
    page = _page(
        "report.html",
        name=run.name,
        subtitle=_subtitle(run.settings),
        headlines=headlines(run),
        loss=sections.loss_plot(run),
        plots=sections.small_plots(run),
        quantization=quantization(run),
        splits=sections.data_splits(run),
        answers=sections.answers(run),
        exports=sections.exports(run),
        export_columns=sections.EXPORT_COLUMNS,
        figures=list(flat({key: value for key, value in run.fit.items() if key != "recovery"})),  # it has a table
        config=list(sections.config_lines(run)),
    )
    path = path or run_dir / "report.html"
    write_text(path, page)
    return path


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page of several runs: curves overlaid, quality, cost and exports in tables, keys that differ.

    Raises:
        ErrorList: directories that hold no run, or the same one twice.
    """
    runs = read_runs(run_dirs)
    about = [
        [_named(run.settings, "method", "name"), _network(run.settings), str(run.files.fit.get("device") or "–")]
        for run in runs
    ]
    page = _page(
        "comparison.html",
        name=f"{len(runs)} runs",
        subtitle=[],
        about_columns=["method", "model", "device", "state"],
        about=list(zip(runs, about, strict=True)),
        plots=overlays(runs),
        tables=tables(runs),
        keys=differing_keys(runs),
    )
    write_text(path, page)
    return path


def _page(template: str, **values: Any) -> str:
    # The package's files are read through importlib: they may lie in a zip.
    environment = Environment(
        loader=PackageLoader("qtrain.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("qtrain.report").joinpath("report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=Markup(css), **values)


def _subtitle(settings: Mapping[str, Any]) -> list[str]:
    """Method, model and recipe, as far as the config names them."""
    names = [_named(settings, "method", "name", ""), _named(settings, "model", "path", "")]
    recipe = settings.get("recipe")
    return [name for name in (*names, f"recipe {recipe}" if recipe else "") if name]


def _network(settings: Mapping[str, Any]) -> str:
    """The model's path, or what an image classifier is called."""
    return _named(settings, "model", "path", "") or _named(settings, "model", "architecture")


def _named(settings: Mapping[str, Any], section: str, key: str, default: str = "–") -> str:
    value = settings.get(section)
    return str(value[key]) if isinstance(value, dict) and value.get(key) else default
