from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.callbacks.layer_diagnostic import DiagnosticsFile
from qtrain.report.quantization import quantization
from qtrain.report.run_files import read_run
from qtrain.report.write import write_report

ROWS = """step,diagnostic,layer,value
9,sqnr,layers.0,20.5
9,sqnr,layers.1,14.25
9,code_flips,layers.0,0.02
9,code_flips,layers.1,0.04
9,weight_saturation,layers.0,0.1
9,activation_saturation,layers.0.input_quantizer,0.01
9,scale_drift,layers.0.weight_quantizer,0.9
9,scale_drift,layers.1.weight_quantizer,1.2
9,pact_alpha,relu.quantizer,6
9,dead_gradients,layers.0,0
19,sqnr,layers.0,21.5
19,sqnr,layers.1,inf
19,code_flips,layers.0,0.0
19,pact_alpha,relu.quantizer,5
29,sqnr,lay"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "diagnostics.csv").write_text(ROWS)
    return tmp_path


def test_series_by_diagnostic_and_layer_without_what_is_no_number(run: Path) -> None:
    found = read_run(run).diagnostics
    assert found["sqnr"] == {"layers.0": [(9, 20.5), (19, 21.5)], "layers.1": [(9, 14.25)]}
    assert found["pact_alpha"]["relu.quantizer"] == [(9, 6.0), (19, 5.0)]


def test_each_diagnostic_has_its_picture_and_the_worst_layers_are_named(run: Path) -> None:
    section = quantization(read_run(run))
    assert section is not None and section.strips is not None
    assert "14.25 dB (pale) to 21.5 dB (full)" in section.strips.title
    assert section.worst == [("layers.1", "14.25 dB"), ("layers.0", "21.5 dB")]
    assert [plot.title for plot in section.plots] == [
        "Codes that changed between two looks",
        "Numbers at the end of their range",
        "Weights without a gradient",
        "Learned scales, smallest and largest",
    ]
    assert section.bounds is not None and "trained bound" in section.bounds.title
    assert section.recovery is None
    assert section.plots[1].keys == ["weights", "activations"]


def test_the_page_has_the_section_and_is_the_same_each_time(run: Path) -> None:
    page = write_report(run).read_text()
    assert "<h2>Quantization</h2>" in page and page.count("<svg") == 2 + 2 + 4
    assert "Furthest from its levels: layers.1 (14.25 dB), layers.0 (21.5 dB)." in page
    assert write_report(run).read_text() == page


def test_hostile_names_of_layers_stay_text(run: Path) -> None:
    (run / "diagnostics.csv").write_text('step,diagnostic,layer,value\n1,sqnr,"<script>alert(1)</script>",3\n')
    assert "<script>" not in write_report(run).read_text()


def test_a_run_without_diagnostics_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: demo\n")
    assert quantization(read_run(tmp_path)) is None
    assert "Quantization</h2>" not in write_report(tmp_path).read_text()


def test_what_the_diagnostics_write_is_read(tmp_path: Path) -> None:
    DiagnosticsFile(tmp_path / "diagnostics.csv").add(4, [("sqnr", "a.b", 12.0), ("sqnr", "a.c", float("inf"))])
    assert read_run(tmp_path).diagnostics == {"sqnr": {"a.b": [(4, 12.0)]}}
