"""The section on quantization: how codes, ranges and layers fared, from diagnostics.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qtrain.evaluation.recovery import AccuracyRecovery, Recovery, recovery_of
from qtrain.report.figures import readable
from qtrain.report.plots import SMALL, TRAIN, VALIDATION, WIDE, Curve, curves, heat_strips, layer_curves
from qtrain.report.run_files import RunFiles, Series
from qtrain.report.sections import Plot

STRIPS = 6
"""Looks that are shown layer by layer, the first and the last among them."""
SHARES = {
    "Codes that changed between two looks": ("codes", {"code_flips": "changed", "frozen": "frozen"}),
    "Numbers at the end of their range": (
        "codes",
        {"weight_saturation": "weights", "activation_saturation": "activations"},
    ),
    "Weights without a gradient": ("weights", {"dead_gradients": "dead"}),
}
"""Title to what is counted, and diagnostics with their names beside the drawing."""


@dataclass(frozen=True)
class Quantization:
    """What the section shows.

    Attributes:
        recovery: the table that the run ended with, and what its figures are.
        strips: SQNR by layer, wide.
        bounds: PACT's, by layer, wide.
        plots: means over layers.
        worst: the layers whose levels fit worst in the end, and their dB.
    """

    recovery: Recovery | AccuracyRecovery | None

    strips: Plot | None
    bounds: Plot | None
    plots: list[Plot]
    worst: list[tuple[str, str]]


def quantization(run: RunFiles) -> Quantization | None:
    """None where nothing was diagnosed, and full precision not compared with."""
    recovery = recovery_of(run.fit)
    if not run.diagnostics and not recovery:
        return None
    found = run.diagnostics
    sqnr = found.get("sqnr", {})
    last = sorted((series[-1][1], layer) for layer, series in sqnr.items())
    plots = [_shares(title, what, names, found) for title, (what, names) in SHARES.items()]
    plots.append(_drift(found.get("scale_drift", {})))
    return Quantization(
        recovery=recovery,
        strips=_strips(sqnr) if sqnr else None,
        bounds=_bounds(found.get("pact_alpha", {})),
        plots=[plot for plot in plots if plot is not None],
        worst=[(layer, f"{readable(value)} dB") for value, layer in last[:3]],
    )


def _strips(sqnr: Mapping[str, Series]) -> Plot:
    steps = sorted({step for series in sqnr.values() for step, _ in series})
    shown = sorted({steps[round(at * (len(steps) - 1) / (STRIPS - 1))] for at in range(STRIPS)})
    layers = [dict(series) for series in sqnr.values()]
    rows = [(f"{step:,}", [layer.get(step, math.nan) for layer in layers]) for step in shown]
    drawn = [value for _, values in rows for value in values if math.isfinite(value)]
    span = f"{readable(min(drawn))} dB (pale) to {readable(max(drawn))} dB (full)"
    wide, narrow = (heat_strips("sqnr by layer", "step", "layer", rows, width) for width in (WIDE[0], SMALL[0]))
    return Plot(f"Signal over quantization noise of each weight, {span}", wide, narrow)


def _shares(title: str, what: str, names: Mapping[str, str], found: Mapping[str, Mapping[str, Series]]) -> Plot | None:
    series = {name: _over_layers(found[name], _percent) for name in names if found.get(name)}
    if not series:
        return None
    first = next(iter(names))
    lines = [Curve(points, TRAIN if name == first else VALIDATION) for name, points in series.items()]
    keys = [names[name] for name in series] if len(series) > 1 else []
    return Plot(title, curves(title.lower(), f"% of the {what}", lines, zero=True), keys=keys)


def _drift(scales: Mapping[str, Series]) -> Plot | None:
    if not scales:
        return None
    lines = [Curve(_over_layers(scales, extreme)) for extreme in (min, max)]
    return Plot("Learned scales, smallest and largest", curves("scale drift", "times their start", lines))


def _bounds(alphas: Mapping[str, Series]) -> Plot | None:
    if not alphas:
        return None
    places = [name.removesuffix(".quantizer") for name in alphas]
    whole = places[0].partition(".")[0] + "."  # the module's attribute that holds the network
    shared = len(whole) if all(place.startswith(whole) for place in places) else 0
    layers = {place[shared:]: series for place, series in zip(places, alphas.values(), strict=True)}
    wide, narrow = (layer_curves("pact alpha", "alpha", layers, width) for width in (WIDE[0], SMALL[0]))
    keys = ["first layer", "last layer"] if len(layers) > 1 else []
    return Plot("Where PACT clips, its trained bound", wide, narrow, keys)


def _percent(values: list[float]) -> float:
    return 100 * sum(values) / len(values)


def _over_layers(layers: Mapping[str, Series], reduce: Callable[[list[float]], float]) -> Series:
    by_step: dict[int, list[float]] = {}
    for series in layers.values():
        for step, value in series:
            by_step.setdefault(step, []).append(value)
    return [(step, reduce(values)) for step, values in sorted(by_step.items())]
