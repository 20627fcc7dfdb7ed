from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.report.plots import (
    COLOURS,
    SMALL,
    VALIDATION,
    Curve,
    _apart,
    curves,
    heat_strips,
    histogram,
    layer_curves,
    smoothed,
    tick_labels,
)

POINTS = [(step, 3 - step / 50) for step in range(100)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_plot_is_one_element_with_the_pages_fonts_and_colours() -> None:
    svg = curves("loss", "nats a token", [Curve(POINTS, smooth=True), Curve(POINTS[::25], VALIDATION, dots=True)])
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") == "loss" and root.get("width") is None and root.get("viewBox")
    assert {"nats a token", "optimizer step"} <= set(texts(svg))
    assert "var(--train)" in svg and "var(--validation)" in svg
    assert not any(word in svg for word in ("DejaVu", "<style", "<metadata", "http://matplotlib", *COLOURS))


def test_the_same_points_give_the_same_bytes() -> None:
    first, again = (curves("loss", "nats", [Curve(POINTS)]) for _ in range(2))
    assert first == again


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=70), zero=st.booleans())
def test_any_finite_series_is_drawn(values: list[float], zero: bool) -> None:
    values = [abs(value) for value in values] if zero else values
    svg = curves("any", "unit", [Curve(list(enumerate(values)), smooth=True)], zero=zero)
    assert "unit" in texts(svg)


def test_one_point_stands_at_a_whole_step() -> None:
    drawn = texts(curves("loss", "", [Curve([(3, 2.0)])], zero=True))
    assert {"2", "3", "4", "0.0"} <= set(drawn)


def test_bars_for_each_bin() -> None:
    svg = histogram("lengths", [0, 10, 20, 30], [5, 0, 7])
    assert svg.count("var(--train)") == 3
    assert {"samples", "tokens in a sample"} <= set(texts(svg))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothing_stays_within_the_values_and_keeps_the_ends(values: list[float]) -> None:
    result = smoothed(values)
    assert len(result) == len(values)
    assert result[0] == values[0] and result[-1] == values[-1]
    assert min(values) - 1e-9 <= min(result) and max(result) <= max(values) + 1e-9


def test_smoothing_does_not_lag_behind_a_slope() -> None:
    slope = [3 - 0.01 * step for step in range(300)]
    assert smoothed(slope) == pytest.approx(slope)


def test_ticks_agree_in_their_decimals() -> None:
    assert tick_labels([0, 0.5, 1]) == ["0.0", "0.5", "1.0"]
    assert tick_labels([0, 5e-5, 1e-4]) == ["0", "0.5 × 10⁻⁴", "1.0 × 10⁻⁴"]
    assert tick_labels([0, 20_000]) == ["0", "20,000"]
    assert tick_labels([0, 1e6, 2e6]) == ["0", "1 × 10⁶", "2 × 10⁶"]
    assert tick_labels([0]) == ["0"]
    assert tick_labels([6.251, 6.2515, 6.252]) == ["6.2510", "6.2515", "6.2520"]
    assert tick_labels([]) == []


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=3, max_size=3), min_size=1, max_size=4
    )
)
def test_strips_hold_a_cell_for_each_value_in_the_pages_colour(rows: list[list[float]]) -> None:
    svg = heat_strips("sqnr", "step", "layer", [(f"row {at}", row) for at, row in enumerate(rows)])
    assert {f"row {at}" for at in range(len(rows))} | {"step", "layer"} <= set(texts(svg))
    assert svg.count("var(--train)") == sum(value == value for row in rows for value in row)
    assert not any(colour in svg for colour in COLOURS)


def test_each_layer_has_a_line_from_the_first_colour_to_the_last_and_its_name() -> None:
    layers = {f"layer{at}": [(step, 1.0 + 0.001 * at) for step in range(5)] for at in range(11)}
    svg = layer_curves("bounds", "alpha", layers)
    assert {*layers, "alpha", "0.0"} <= set(texts(svg))
    for share in (0, 50, 100):
        assert f"color-mix(in srgb, var(--validation) {share}%, var(--train))" in svg
    assert "#06" not in svg
    narrow = layer_curves("bounds", "alpha", layers, SMALL[0])
    assert not set(layers) & set(texts(narrow)) and narrow.count("color-mix") >= 11


@given(places=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_names_beside_a_drawing_keep_their_order_and_their_distance(places: list[float]) -> None:
    given_places = {str(at): place for at, place in enumerate(places)}
    moved = _apart(given_places, 0.08)
    order = sorted(given_places, key=given_places.__getitem__)
    assert sorted(moved.values()) == [moved[name] for name in order]
    assert all(b - a >= 0.08 - 1e-9 for a, b in pairwise(sorted(moved.values())))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved.values())
    assert _apart({"alone": 0.3, "far": 0.9}, 0.08) == {"alone": 0.3, "far": 0.9}
