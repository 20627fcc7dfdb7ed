"""What the data turned out to be: counts, lengths, losses by cutting, one sample as the model sees it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qtrain.data.encoding import Tally
from qtrain.data.sample import IGNORED, Sample, SampleStore

BINS = 24
SHOWN_TOKENS = 512


@dataclass(frozen=True)
class SplitSummary:
    """Facts of one split. Lengths are tokens of a sample before it was cut or split; ``padding`` counts as none."""

    samples: int
    tokens: int
    loss_tokens: int
    length_min: int
    length_p50: int
    length_p90: int
    length_max: int
    histogram_edges: list[float]
    histogram_counts: list[int]
    truncated: int
    tokens_cut: int
    split_documents: int
    masked: int
    rows: int
    efficiency: float
    template: str | None
    example: list[tuple[str, bool]]
    streamed: bool = False


@dataclass
class DataSummary:
    """Facts of every split that was read."""

    splits: dict[str, SplitSummary] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: {split: facts}; the example is a list of [text, trained]."""
        facts = {name: asdict(split) for name, split in self.splits.items()}
        for split in facts.values():
            split["example"] = [list(segment) for segment in split["example"]]
        return facts

    def lines(self) -> list[str]:
        """One fact a line, aligned, for the terminal."""
        return [line for name, split in self.splits.items() for line in _lines(name, split)]


def summarize(
    store: SampleStore,
    tally: Tally,
    *,
    rows: int,
    slots: int,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    streamed: bool = False,
) -> SplitSummary:
    """Facts of one split.

    Args:
        slots: places for tokens in all rows, padding included.
    """
    lengths = np.asarray(tally.lengths or [0])
    counts, edges = np.histogram(lengths, bins=BINS)
    low, middle, high, top = (int(np.percentile(lengths, q, method="higher")) for q in (0, 50, 90, 100))
    return SplitSummary(
        samples=len(tally.lengths),
        tokens=store.tokens,
        loss_tokens=store.loss_tokens,
        length_min=low,
        length_p50=middle,
        length_p90=high,
        length_max=top,
        histogram_edges=[float(edge) for edge in edges],
        histogram_counts=[int(count) for count in counts],
        truncated=tally.truncated,
        tokens_cut=tally.tokens_cut,
        split_documents=tally.split_documents,
        masked=tally.masked,
        rows=rows,
        efficiency=store.tokens / slots if slots else 0.0,
        template=template,
        example=segments(store[0], tokenizer),
        streamed=streamed,
    )


def segments(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The sample as text in stretches that are trained or not, special tokens shown; at most 512 tokens."""
    pairs = list(zip(sample.input_ids, sample.labels, strict=True))[:SHOWN_TOKENS]
    stretches = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in pairs])), trained) for trained, pairs in stretches]


def _lines(name: str, split: SplitSummary) -> list[str]:
    lengths = f"min {split.length_min}, median {split.length_p50}, 90 % {split.length_p90}, max {split.length_max}"
    facts = {
        "samples": f"{split.samples:,}" + (" (of the first block of a stream)" if split.streamed else ""),
        "lengths": lengths + " tokens",
        "tokens": f"{split.tokens:,}, of them {split.loss_tokens:,} carry loss",
        "rows": f"{split.rows:,}, {split.efficiency:.1%} of them tokens, the rest padding",
    }
    if split.truncated:
        facts["truncated"] = f"{split.truncated:,} chats, {split.tokens_cut:,} tokens cut off (data.max_length)"
    if split.split_documents:
        facts["split"] = f"{split.split_documents:,} documents into windows"
    if split.masked:
        facts["dropped"] = f"{split.masked:,} samples without a token that carries loss"
    if split.template:
        facts["template"] = split.template
    return [f"{name:<12}{fact:<12}{value}" for fact, value in facts.items()]
