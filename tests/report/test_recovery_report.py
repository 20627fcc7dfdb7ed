"""What a quantization-aware run shows first: what rounding took, and what training gave back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.report.figures import headlines
from qtrain.report.run_files import read_run
from qtrain.report.sections import loss_plot, small_plots
from qtrain.report.write import write_report

METRICS = """step,train/loss,val/loss,val/perplexity
0,,3.40,29.9
0,0.31,,
1,0.22,,
2,0.15,,
2,,3.37,29.1
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "config.yaml").write_text("method:\n  name: qat\ndistill:\n  loss: forward_kl\n")
    return tmp_path


def recovered(run: Path, **changes: Any) -> Path:
    figures = {"full": 26.1, "ptq": 73.3, "qat": 33.0, "share": 0.773} | changes
    (run / "fit.json").write_text(json.dumps({"steps": 3, "recovery": figures}))
    return run


def test_the_table_stands_in_the_section_and_the_share_on_top(run: Path) -> None:
    page = write_report(recovered(run)).read_text()
    for name, value in (
        ("full precision", "26.100"),
        ("PTQ (round to nearest)", "73.300"),
        ("QAT", "33.000"),
        ("share recovered", "77.3%"),
    ):
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in page
    assert "perplexity, held-out text" in page
    assert 'class="warning"' not in page
    assert "recovery" not in page.split("<h2>Figures</h2>")[1].split("<h2>Config</h2>")[0]
    found = {headline.label: headline.value for headline in headlines(read_run(run))}
    assert found["recovered by QAT"] == "77.3%"


def test_harm_is_a_warning(run: Path) -> None:
    page = write_report(recovered(run, qat=80.0, share=-0.08)).read_text()
    assert (
        '<p class="warning">Warning: the trained model (80.00) is worse than plain rounding to nearest (73.30)' in page
    )
    assert "−8.5%" in page  # the headline


def test_nothing_lost_is_no_headline(run: Path) -> None:
    page = write_report(recovered(run, ptq=26.0, qat=25.9, share=None)).read_text()
    assert "nothing was lost" in page
    assert "recovered by QAT" not in page


def test_a_divergence_and_a_held_out_loss_have_axes_of_their_own(run: Path) -> None:
    files = read_run(run)
    plot = loss_plot(files)
    assert files.teacher == "forward_kl" and plot is not None
    assert plot.title == "Training loss, forward kl from the teacher" and plot.keys == []
    assert [plot.title for plot in small_plots(files)] == ["Held-out loss"]
    (run / "config.yaml").write_text("method:\n  name: qat\ndistill:\n  loss: none\n")
    together = loss_plot(read_run(run))
    assert together is not None and together.keys == ["train", "held-out"]
    assert small_plots(read_run(run)) == []


@pytest.mark.parametrize("config", ["", "[]", "distill: 3\n", "a: b\n"])
def test_a_config_without_sections_is_no_harm(run: Path, config: str) -> None:
    (run / "config.yaml").write_text(config)
    assert read_run(run).teacher is None
    write_report(run)
