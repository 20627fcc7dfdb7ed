"""Numbers as people read them, and the few that come first."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.evaluation.recovery import recovery_of
from qtrain.report.run_files import RunFiles

BINARY_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"]
SPELLED = {"gib": "GiB", "kl": "KL", "lr": "learning rate", "mfu": "MFU", "id": "ID"}


@dataclass(frozen=True)
class Headline:
    """One large figure with what it means and how it came about."""

    label: str
    value: str
    note: str = ""


def label(key: str) -> str:
    """``throughput/peak_gib`` to ``throughput peak GiB``."""
    words = re.split(r"[_./\s]+", key)
    return " ".join(SPELLED.get(word.lower(), word) for word in words if word)


def readable(value: Any, key: str = "") -> str:
    """A figure in four significant digits, in the unit that its key names."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("bytes"):
        return size(value)
    if key.endswith("seconds") and not key.endswith("per_second"):
        return duration(value)
    if key.endswith("per_second") and abs(value) >= 10:
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g} × 10{superscript(int(exponent))}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    power = 0
    while abs(count) >= 1024 and power < len(BINARY_UNITS) - 1:
        count, power = count / 1024, power + 1
    whole = not power or count >= 100
    return f"{count:,.0f} {BINARY_UNITS[power]}" if whole else f"{count:.3g} {BINARY_UNITS[power]}"


def duration(seconds: float) -> str:
    """``75`` to ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def superscript(exponent: int) -> str:
    """``-4`` as superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(label, readable value) of every figure, nested ones by the path of their keys."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else readable(value, str(key))
            yield label(path), text


def headlines(run: RunFiles) -> list[Headline]:
    """The figures one asks for first, as far as the run has them."""
    found = []
    recovery = recovery_of(run.fit)
    recovered = None if recovery is None else recovery.share
    first, last = _ends(run, "loss")
    if last is not None and recovered is None:
        change = f"from {readable(first)}, {(last - first) / first:+.1%}".replace("-", "−") if first else ""
        found.append(Headline("held-out loss", readable(last), change))
    first, last = _ends(run, "perplexity")
    if last is not None:
        found.append(Headline("held-out perplexity", readable(last), f"from {readable(first)}" if first else ""))
    if recovered is not None:
        found.append(Headline("recovered by QAT", f"{recovered:.1%}".replace("-", "−"), "of what rounding lost"))
    for column, split, name in (("val", "validation", "held-out accuracy"), ("test", "test", "test accuracy")):
        if curve := run.metrics.get(f"{column}/accuracy"):
            images = run.data.get(split, {}).get("samples")
            found.append(Headline(name, f"{curve[-1][1]:.2%}", f"of {images:,} images" if images else ""))
    if rates := run.metrics.get("throughput/tokens_per_second"):
        found.append(
            Headline(
                "tokens per second", f"{statistics.median(rate for _, rate in rates):,.0f}", "median, without padding"
            )
        )
    if peaks := run.metrics.get("throughput/peak_gib"):
        found.append(Headline("peak memory", f"{max(peak for _, peak in peaks):.3g} GiB"))
    drifted = {name: export for name, export in run.exports.items() if "top1" in export}
    if drifted:
        name, export = min(drifted.items(), key=lambda pair: pair[1]["top1"])
        found.append(Headline("exported, same top token", f"{export['top1']:.1%}", name))
    return found


def _ends(run: RunFiles, figure: str) -> tuple[float | None, float | None]:
    """The held-out figure before and after training: of fit.json, which measures both, else of the curve's ends."""
    curve = [value for _, value in run.metrics.get(f"val/{figure}", [])]
    first, last = curve[0] if len(curve) > 1 else None, curve[-1] if curve else None
    return run.fit.get(f"val_{figure}_before", first), run.fit.get(f"val_{figure}_after", last)
