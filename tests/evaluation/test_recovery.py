"""The table that every quantization-aware run ends with."""

from __future__ import annotations

import math

import pytest

from qtrain.evaluation.recovery import Recovery


def test_the_share_is_of_the_log_gap() -> None:
    # The issue's own figures: 26.1, 73.3 and 33.0 are "77 % of the log-perplexity gap".
    assert Recovery(26.1, 73.3, 33.0).share == pytest.approx(0.773, abs=5e-4)
    assert Recovery(10, 20, 10).share == 1.0
    assert Recovery(10, 20, 20).share == 0.0


def test_harm_is_told_and_nothing_lost_is_no_share() -> None:
    worse = Recovery(10, 20, 25)
    assert worse.share is not None and worse.share < 0
    assert worse.warning and "25.00" in worse.warning and "optimizer.lr" in worse.warning
    assert Recovery(10, 20, 15).warning is None
    assert Recovery(10, 9.9, 9.8).share is None
    assert dict(Recovery(10, 9.9, 9.8).rows())["share recovered"] == "nothing was lost"
    assert Recovery(10, math.inf, 12).share is None
