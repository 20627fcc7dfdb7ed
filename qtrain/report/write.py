"""The report of a run: report.html, which needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qtrain.files import write_text
from qtrain.report import sections
from qtrain.report.figures import flat, headlines
from qtrain.report.quantization import quantization
from qtrain.report.run_files import read_run


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what lies beside it, and return its path; what is missing is left out.

    The same files give the same bytes. Texts of samples and data are escaped, and the page allows no script.

    Raises:
        CheckpointError: there is no such directory, or a file in it cannot be read.
    """
    run = read_run(run_dir)
    # The package's files are read through importlib: they may lie in a zip.
    environment = Environment(
        loader=PackageLoader("qtrain.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        css=Markup(resources.files("qtrain.report").joinpath("report.css").read_text(encoding="utf-8")),
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
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _subtitle(settings: Mapping[str, Any]) -> list[str]:
    """Method, model and recipe, as far as the config names them."""
    found = []
    for section, key in (("method", "name"), ("model", "path")):
        value = settings.get(section)
        if isinstance(value, dict) and value.get(key):
            found.append(str(value[key]))
    recipe = settings.get("recipe")
    return [*found, f"recipe {recipe}"] if recipe else found
