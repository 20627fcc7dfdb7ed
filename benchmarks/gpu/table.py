"""Lines of JSON to a table: each case with its figures, and their ratio to each peer's of the same sitting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import ROWS, Against, Case, Row

Line = dict[str, Any]
HEAD = ("case", "tokens/s", "TFLOP/s", "peak GiB", "held against", "speed", "asked", "memory", "asked")


def read_lines(files: Iterable[Path]) -> list[Line]:
    """All results of some files, the newest last."""
    lines = [json.loads(line) for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]
    return sorted(lines, key=lambda line: str(line["sitting"]))


def render(lines: Sequence[Line]) -> str:
    """Markdown: a table a row, then what ran where and what each run said of its kernels."""
    if not lines:
        return "Nothing was measured.\n"
    parts = [f"# Speed and memory, {date.today().isoformat()}\n"]
    devices = sorted({str(line["device"]) for line in lines if "device" in line})
    versions: dict[str, str] = next((line["versions"] for line in reversed(lines) if "versions" in line), {})
    parts.append(
        f"{', '.join(devices)}; {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        "Ratios are ours over the peer's, both of one sitting and one GPU; TFLOP/s by 4 P a token, 6 P where the "
        "weights train, without adapters, attention and recomputation.\n"
    )
    for row in ROWS.values():
        own = [line for line in lines if line["row"] == row.name]
        if own:
            parts.append(f"## {row.title}\n\n{_table(row, own)}\n\n{_notes(row, own)}")
    return "\n".join(parts)


def _table(row: Row, lines: Sequence[Line]) -> str:
    more = [key for key in ("attention_share", "rest_us_per_token", "state_gib") if any(key in it for it in lines)]
    cells = [[*HEAD, *(key.replace("_", " ") for key in more)]]
    for case in row.cases:
        own = [line for line in lines if line["case"] == case.name]
        for number, against in enumerate(case.against or (None,)):
            line, peer = _pair(own, lines, against)
            if line is None:
                continue
            first = number == 0
            cells.append(
                [
                    *(_figures(line) if first else [""] * 4),
                    *_ratios(line, peer, against, case),
                    *(str(line.get(key, "")) if first else "" for key in more),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _pair(own: Sequence[Line], lines: Sequence[Line], against: Against | None) -> tuple[Line | None, Line | None]:
    """The newest result with its peer's of the same sitting and GPU; without, where there is no such pair."""
    if against is not None:
        for line in reversed(own):
            for peer in reversed(lines):
                same = all(line[key] == peer[key] for key in ("sitting", "gpu"))
                if peer["case"] == against.case and same and _measured(line) and _measured(peer):
                    return line, peer
    measured = [line for line in own if _measured(line)]
    return next(reversed(measured or own), None), None


def _measured(line: Line) -> bool:
    return "tokens_per_second" in line


def _figures(line: Line) -> list[str]:
    if not _measured(line):
        return [str(line["case"]), "not here" if "not_here" in line else "failed", "", ""]
    peak = line["peak_gib"]
    return [
        str(line["case"]),
        f"{line['tokens_per_second']:,.0f}",
        f"{line['tflops']:.3g}",
        "" if peak is None else f"{peak:.2f}",
    ]


def _ratios(line: Line, peer: Line | None, against: Against | None, case: Case) -> list[str]:
    if against is None:
        return ["", "", "", "", "" if case.at_most is None else f"< {case.at_most:g} GiB"]
    asked = "" if against.speed is None else f"≥ {against.speed:.2f}"
    allowed = "" if against.memory is None else f"≤ {against.memory:.2f}"
    speed = memory = ""
    if peer is not None:
        speed = f"{line['tokens_per_second'] / peer['tokens_per_second']:.2f}"
        both = line["peak_gib"], peer["peak_gib"]
        memory = f"{both[0] / both[1]:.2f}" if all(both) else ""
    return [against.case, speed, asked, memory, allowed]


def _notes(row: Row, lines: Sequence[Line]) -> str:
    """What the newest run of each case said, or why there is none."""
    notes = []
    for case in row.cases:
        own = [line for line in lines if line["case"] == case.name]
        if not own:
            continue
        line = next((line for line in reversed(own) if _measured(line)), own[-1])
        why = line.get("not_here") or line.get("failed")
        notes.append(f"- {case.name}: {why or '; '.join(line['said'])}")
    return "\n".join(notes) + "\n"
