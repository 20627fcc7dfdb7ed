from __future__ import annotations

from typing import Any

import pytest

from qtrain.report.figures import duration, flat, headlines, label, readable, size
from qtrain.report.run_files import RunFiles


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        (None, "", "–"),
        (True, "", "yes"),
        (False, "", "no"),
        ("nf4", "", "nf4"),
        (134515008, "parameters", "134,515,008"),
        (1.72345, "val_loss", "1.723"),
        (12.0, "loss", "12"),
        (0.0, "kl", "0"),
        (2e-4, "lr", "2 × 10⁻⁴"),
        (2.1e-5, "kl", "2.1 × 10⁻⁵"),
        (1.23e12, "flops", "1.23 × 10¹²"),
        (16543.2, "tokens_per_second", "16,543"),
        (2.913, "steps_per_second", "2.913"),
        (412.3, "seconds", "6 min 52 s"),
        (118_400_000, "bytes", "113 MiB"),
        (float("inf"), "perplexity", "inf"),
        (float("nan"), "loss", "nan"),
    ],
)
def test_numbers_read_well(value: Any, key: str, text: str) -> None:
    assert readable(value, key) == text


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 1023, 1536, 2**20, 300 * 2**20, 2.5 * 2**30, 5000 * 2**40)] == [
        "0 B",
        "1,023 B",
        "1.5 KiB",
        "1 MiB",
        "300 MiB",
        "2.5 GiB",
        "5,000 TiB",
    ]
    assert [duration(s) for s in (0.25, 59, 75, 3600, 7322)] == [
        "0.25 s",
        "59 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 2 min",
    ]


def test_nested_figures_are_named_by_their_path() -> None:
    figures = {"peak_gib": 2.5, "validation": {"loss": 1.5, "kl": 0.1}, "layers": [1, 2]}
    assert list(flat(figures)) == [
        ("peak GiB", "2.5"),
        ("validation loss", "1.5"),
        ("validation KL", "0.1"),
        ("layers", "1, 2"),
    ]
    assert label("throughput/tokens_per_second") == "throughput tokens per second"


def test_headlines_tell_the_change_and_the_export_that_drifts_most() -> None:
    metrics = {
        "val/loss": [(0, 4.0), (10, 3.0)],
        "val/perplexity": [(10, 20.0)],
        "throughput/tokens_per_second": [(1, 100.0), (2, 300.0), (3, 110.0)],
        "throughput/peak_gib": [(1, 2.0), (2, 3.0), (3, 1.0)],
    }
    exports = {"merged": {"top1": 0.999}, "compressed-tensors": {"top1": 0.93}, "adapter": {"bytes": 1}}
    run = RunFiles("run", "", metrics, {}, {}, [], exports)
    assert [(line.value, line.note) for line in headlines(run)] == [
        ("3", "from 4, −25.0%"),
        ("20", ""),
        ("110", "median, without padding"),
        ("3 GiB", ""),
        ("93.0%", "compressed-tensors"),
    ]
    assert headlines(RunFiles("run", "", {}, {}, {}, [], {})) == []


def test_accuracies_are_told_with_the_number_of_images() -> None:
    metrics = {"val/accuracy": [(10, 0.5), (20, 0.91)], "test/accuracy": [(20, 0.9043)]}
    run = RunFiles("run", "", metrics, {}, {"test": {"samples": 10000}}, [], {})
    assert [(line.label, line.value, line.note) for line in headlines(run)] == [
        ("held-out accuracy", "91.00%", ""),
        ("test accuracy", "90.43%", "of 10,000 images"),
    ]


def test_the_fits_own_figures_come_before_the_curves() -> None:
    fit = {"val_loss_before": 4.0, "val_loss_after": 2.0}
    run = RunFiles("run", "", {"val/loss": [(5, 3.0), (10, 2.1)]}, fit, {}, [], {})
    assert [(line.value, line.note) for line in headlines(run)] == [("2", "from 4, −50.0%")]
