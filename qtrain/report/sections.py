"""What each section of the report shows, from the files that the run has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from qtrain.report.figures import readable, size
from qtrain.report.plots import SMALL, VALIDATION, WIDE, Curve, curves, histogram
from qtrain.report.run_files import RunFiles

DATA_FACTS = {
    "samples": "samples",
    "tokens": "tokens",
    "loss_tokens": "tokens with loss",
    "rows": "rows",
    "efficiency": "packing efficiency",
    "length_p50": "length, median",
    "length_p90": "length, 90th percentile",
    "length_max": "length, longest",
    "truncated": "cut to max_length",
    "tokens_cut": "tokens cut off",
    "split_documents": "documents split into windows",
    "masked": "dropped, nothing to learn",
    "template": "chat template",
}
ZERO_IS_SILENT = {"truncated", "tokens_cut", "split_documents", "masked"}
EXPORT_COLUMNS = [
    "format",
    "perplexity, trained",
    "perplexity, exported",
    "change",
    "KL, nats a token",
    "same top token",
    "size",
    "bits a weight",
    "verified",
]


@dataclass(frozen=True)
class Plot:
    """One drawing with its title; ``narrow`` is the same for a phone where the first is too wide."""

    title: str
    svg: Markup
    narrow: Markup | None = None
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Split:
    """One split of the data: its facts, the lengths of its samples, and one sample as the model sees it."""

    name: str
    facts: list[tuple[str, str]]
    lengths: Plot | None
    example: list[tuple[str, bool]]


@dataclass(frozen=True)
class Answers:
    """One prompt and its answers, (step, text), oldest first."""

    prompt: str
    texts: list[tuple[int, str]]

    @property
    def ends(self) -> list[tuple[int, str]]:
        """The first and the last one, or the only one."""
        return [self.texts[0], self.texts[-1]] if len(self.texts) > 1 else self.texts


@dataclass(frozen=True)
class Export:
    """One format: its row of the table, and what there is to say about it."""

    cells: list[str]
    notes: list[str]


def loss_plot(run: RunFiles) -> Plot | None:
    """Training and held-out loss; the training's alone where it is a divergence: the two share no axis then."""
    train, validation = run.metrics.get("train/loss"), run.metrics.get("val/loss")
    if run.teacher is not None and train:
        wide, narrow = (curves("loss", "nats a token", [Curve(train, smooth=True)], size) for size in (WIDE, SMALL))
        return Plot(f"Training loss, {run.teacher.replace('_', ' ')} from the teacher", wide, narrow)
    lines = [Curve(train, smooth=True)] if train else []
    lines += [Curve(validation, VALIDATION, dots=True)] if validation else []
    if not lines:
        return None
    keys = [name for name, series in (("train", train), ("held-out", validation)) if series]
    unit = "nats an image" if run.metrics.get("val/accuracy") or run.metrics.get("test/accuracy") else "nats a token"
    wide, narrow = (curves("loss", unit, lines, size) for size in (WIDE, SMALL))
    return Plot("Loss", wide, narrow, keys)


def small_plots(run: RunFiles) -> list[Plot]:
    """Held-out figures, learning rate, speed and memory."""
    speed = ("Speed", "throughput/tokens_per_second", "tokens a second, without padding")
    if not run.metrics.get(speed[1]):
        speed = ("Speed", "throughput/samples_per_second", "samples a second")
    wanted = [
        ("Held-out accuracy", "val/accuracy", ""),
        ("Learning rate", "train/lr", ""),
        speed,
        ("Peak memory", "throughput/peak_gib", "GiB"),
    ]
    plots = [
        Plot(title, curves(title.lower(), unit, [Curve(run.metrics[name])], zero=True))
        for title, name, unit in wanted
        if run.metrics.get(name)
    ]
    if run.teacher is None or not run.metrics.get("train/loss") or not run.metrics.get("val/loss"):
        return plots
    held_out = curves("held-out loss", "nats a token", [Curve(run.metrics["val/loss"], VALIDATION, dots=True)])
    return [Plot("Held-out loss", held_out), *plots]


def data_splits(run: RunFiles) -> list[Split]:
    """One entry for each split of data.json; facts that are missing are left out."""
    return [_split(name, summary) for name, summary in run.data.items()]


def answers(run: RunFiles) -> list[Answers]:
    """Samples by prompt, in the order they were first asked."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        texts.setdefault(str(sample.get("prompt", "")), []).append(
            (int(sample.get("step", 0)), str(sample.get("text", "")))
        )
    return [Answers(prompt, sorted(pairs, key=lambda pair: pair[0])) for prompt, pairs in texts.items()]


def exports(run: RunFiles) -> list[Export]:
    """One row for each exported format."""
    return [_export(name, facts) for name, facts in run.exports.items()]


def config_lines(run: RunFiles) -> Iterator[tuple[str, str]]:
    """(key with its indent and colon, the rest) of each line of config.yaml."""
    for line in run.config.splitlines():
        key, colon, value = line.partition(":")
        yield (key + colon, value) if colon and not key.lstrip().startswith(("#", "-")) else ("", line)


def _split(name: str, summary: dict[str, Any]) -> Split:
    facts = [
        (label, f"{summary[key]:.1%}" if key == "efficiency" else readable(summary[key]))
        for key, label in DATA_FACTS.items()
        if summary.get(key) is not None and not (key in ZERO_IS_SILENT and not summary[key])
    ]
    lengths = None
    edges, counts = summary.get("histogram_edges"), summary.get("histogram_counts")
    if edges and counts and len(edges) == len(counts) + 1:
        lengths = Plot(f"Lengths, {name}", histogram(f"lengths {name}", edges, counts))
    example = [(str(text), bool(trained)) for text, trained in summary.get("example") or []]
    return Split(name, facts, lengths, example)


def _export(name: str, facts: dict[str, Any]) -> Export:
    before, after = facts.get("reference_perplexity"), facts.get("candidate_perplexity")
    change = f"{after / before - 1:+.1%}".replace("-", "−") if before and after is not None else "–"
    bits = facts.get("bits_per_weight", facts.get("bits_per_quantized_weight"))
    top1, verified = facts.get("top1"), facts.get("verified")
    cells = [
        name,
        readable(before),
        readable(after),
        change,
        readable(facts.get("kl")),
        "–" if top1 is None else f"{top1:.1%}",
        "–" if facts.get("bytes") is None else size(facts["bytes"]),
        readable(bits),
        "–" if verified is None else "yes" if verified["passed"] else "no",
    ]
    notes = [str(note) for key in ("notes", "fallbacks") for note in facts.get(key) or []]
    return Export(cells, notes)
