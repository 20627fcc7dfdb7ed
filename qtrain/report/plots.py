"""Plots as SVG elements that take the page's fonts and colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qtrain.report.figures import superscript
from qtrain.report.run_files import Series

# matplotlib writes these stand-ins; the page's stylesheet owns the colours, for light and dark.
COLOURS = {
    "#010101": "var(--ink-2)",
    "#020202": "var(--rule)",
    "#030303": "var(--train)",
    "#040404": "var(--validation)",
    "#050505": "var(--paper)",
}
INK, RULE, TRAIN, VALIDATION, PAPER = COLOURS
BETWEEN = re.compile("#06([0-9a-f]{2})06")
"""Stands in for so many per cent of the way from TRAIN to VALIDATION, in two hexadecimal digits."""
RUN = re.compile("#07([0-9a-f]{2})07")
"""Stands in for the colour of a run among several, ``--run-N``."""
STEPS = [1, 2, 2.5, 5, 10]
"""Ticks lie at round numbers."""
WIDE, SMALL = (14.4, 3.9), (4.7, 2.75)
"""Inches of 72 units; the page shows a unit at about a pixel, so that text has its size on a phone too."""
NAME, MOST_NAMES = 13, 40
"""Units from one name beside a drawing to the next, and how many names a drawing may have."""


@dataclass(frozen=True)
class Curve:
    """One line: its points, its colour, and how it is drawn; ``dashes`` are units drawn and left out in turn."""

    points: Series
    colour: str = TRAIN
    smooth: bool = False
    dots: bool = False
    dashes: tuple[float, ...] = ()
    width: float = 1.8
    alpha: float = 1.0


def curves(
    name: str, unit: str, lines: Sequence[Curve], size: tuple[float, float] = SMALL, zero: bool = False
) -> Markup:
    """Values over optimizer steps; ``zero`` begins the axis there."""
    figure, axes = _canvas(size)
    for line in lines:
        steps, values = [step for step, _ in line.points], [value for _, value in line.points]
        if line.smooth and len(values) >= 30:
            axes.plot(steps, values, color=line.colour, linewidth=0.8, alpha=0.4)
            values = smoothed(values)
        lone = len(values) == 1
        style = (0, line.dashes) if line.dashes else "-"
        axes.plot(
            steps,
            values,
            color=line.colour,
            linewidth=line.width,
            linestyle=style,
            alpha=line.alpha,
            solid_capstyle="round",
        )
        if line.dots or lone:
            axes.scatter(
                steps, values, s=42, color=line.colour, edgecolors=PAPER, linewidths=1.5, zorder=3, clip_on=False
            )
    if zero:
        axes.set_ylim(bottom=0, top=max(value for line in lines for _, value in line.points) * 1.15 or 1)
    axes.set_xlabel("optimizer step", loc="right")
    steps = [step for line in lines for step, _ in line.points]
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)  # there are no fractions of a step
    return _finish(figure, axes, unit, name)


def layer_curves(name: str, unit: str, layers: Mapping[str, Series], width: float = WIDE[0]) -> Markup:
    """Values of each layer over optimizer steps, from the first layer's colour to the last one's; the axis begins at 0.

    A wide drawing names each layer where its line ends, and is as high as its names need.
    """
    named = width == WIDE[0] and len(layers) <= MOST_NAMES
    # A quarter more than the names take, or they would stand in a column as if all lines were as far from each other.
    height = max(WIDE[1], (66 + 1.25 * NAME * len(layers)) / 72) if named else WIDE[1] if width == WIDE[0] else SMALL[1]
    figure, axes = _canvas((width, height))
    for at, series in enumerate(layers.values()):
        steps, values = [step for step, _ in series], [value for _, value in series]
        axes.plot(steps, values, color=_between(at, len(layers)), linewidth=1.5, solid_capstyle="round")
    top = max((value for series in layers.values() for _, value in series), default=0) * 1.05 or 1
    axes.set_ylim(0, top)
    axes.set_xlabel("optimizer step", loc="right")
    ends = {layer: series[-1][1] / top for layer, series in layers.items()} if named else {}
    area = 72 * height - 66
    for layer, place in _apart(ends, NAME / area).items():
        colour = _between(list(layers).index(layer), len(layers))
        axes.annotate(
            layer,
            (1, ends[layer]),
            (22, area * (place - ends[layer])),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=10,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    return _finish(figure, axes, unit, name, right=30 + 5.6 * max(map(len, ends), default=-4))


def histogram(name: str, edges: Sequence[float], counts: Sequence[float]) -> Markup:
    """Samples over their length in tokens."""
    figure, axes = _canvas(SMALL)
    widths = [high - low for low, high in zip(edges, edges[1:], strict=False)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=TRAIN, edgecolor=PAPER, linewidth=1)
    axes.set_xlabel("tokens in a sample", loc="right")
    return _finish(figure, axes, "samples", name)


def heat_strips(
    name: str, unit: str, across: str, rows: Sequence[tuple[str, Sequence[float]]], width: float = WIDE[0]
) -> Markup:
    """A strip of cells for each (label, values), first on top; the fuller the colour, the larger; NaN stays empty."""
    figure, axes = _canvas((width, 1.0 + 0.42 * len(rows)))
    finite = [value for _, values in rows for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    for at, (_, values) in enumerate(rows):
        alphas = [0.0 if math.isnan(v) else 0.1 + 0.9 * ((v - low) / (high - low) if high > low else 1) for v in values]
        # Cells are drawn and not an image, which would bring colours of its own; 1 % wider, or gaps would shimmer.
        colours = [(TRAIN, round(alpha, 3)) for alpha in alphas]
        axes.bar(range(len(values)), 0.86, 1.01, bottom=-at - 0.43, align="edge", color=colours, linewidth=0)
    axes.set_xlabel(across, loc="right")
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    return _finish(figure, axes, unit, name, {-at: label for at, (label, _) in enumerate(rows)})


def run_colour(at: int) -> str:
    """Of the run at this place among several."""
    return f"#07{at:02x}07"


def _between(at: int, count: int) -> str:
    return f"#06{round(100 * at / max(1, count - 1)):02x}06"


def _apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places from 0 to 1, moved as little as keeps them ``gap`` apart in their order; from above, then from below."""
    order = sorted(places, key=places.__getitem__)
    moved = dict(places)
    for nearest, step in ((1 + gap, -gap), (-gap, gap)):
        last = nearest
        for name in reversed(order) if step < 0 else order:
            moved[name] = last = min(moved[name], last + step) if step < 0 else max(moved[name], last + step)
    return moved


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a thirtieth of the run around each point; centred, since a trailing mean hangs above a falling loss."""
    reach = max(1, len(values) // 60)
    result = []
    for at in range(len(values)):
        near = min(reach, at, len(values) - 1 - at)
        window = values[at - near : at + near + 1]
        result.append(sum(window) / len(window))
    return result


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks with the same number of decimals, and small ones with the same power of ten."""
    largest = max((abs(value) for value in values), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    power = exponent if not -3 <= exponent < 6 else 0
    shown = [value / 10.0**power for value in values]
    # As many digits as tell them apart: a loss between 6.2510 and 6.2530 has ticks at 6.2515.
    digits = next((n for n in range(4, 12) if len({f"{value:.{n}g}" for value in shown}) == len(set(shown))), 12)
    decimals = max((len(f"{value:.{digits}g}".partition(".")[2]) for value in shown), default=0)
    scale = f" × 10{superscript(power)}" if power else ""
    return [f"{value:,.{decimals}f}{scale}" if value or not power else "0" for value in shown]


def _canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _finish(
    figure: Figure, axes: Axes, unit: str, name: str, labels: Mapping[int, str] | None = None, right: float = 12
) -> Markup:
    """Horizontal rules only, the unit where the axis begins, and the drawing as an element of the page.

    Args:
        labels: of places on the vertical axis, instead of round numbers and their rules.
        right: units left free on that side.
    """
    width, height = (72 * inches for inches in figure.get_size_inches())
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.set_axisbelow(True)
    if labels is None:
        axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=11, length=0, pad=6)
    axes.xaxis.label.set(color=INK, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    if labels is not None:
        axes.set_yticks(list(labels), list(labels.values()))
    else:
        ticks = [tick for tick in MaxNLocator(6, steps=STEPS).tick_values(low, high) if low <= tick <= high]
        axes.set_yticks(ticks, tick_labels([round(tick, 12) for tick in ticks]))
    # Units of the drawing, the same for each: axes that stand side by side share their lines.
    left = 14 + 6.2 * max(len(text.get_text()) for text in axes.get_yticklabels())
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - 24 / height, bottom=42 / height)
    figure.text(0, 1 - 10 / height, unit, fontsize=11, color=INK, va="center")
    text = io.StringIO()
    # Text stays text; the salt makes the ids of clip paths the same from one run to the next.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True)
    return Markup(_inline(text.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """An element of a page: no prolog, no metadata, no size, no style that would reach beyond it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = BETWEEN.sub(
        lambda found: f"color-mix(in srgb, {COLOURS[VALIDATION]} {int(found[1], 16)}%, {COLOURS[TRAIN]})", svg
    )
    svg = RUN.sub(lambda found: f"var(--run-{int(found[1], 16)})", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()
