"""Whole splits: read, encoded, packed, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qtrain.data.contents import Item, read_contents
from qtrain.data.encoding import Encoder, Tally
from qtrain.data.packing import pack
from qtrain.data.sample import SampleStore
from qtrain.data.sources import Location, TokenDirectory
from qtrain.data.summary import SplitSummary, summarize
from qtrain.data.tokens.rows import add_shards, open_tokens
from qtrain.errors import DataError

CHUNK = 256
"""Samples tokenized in one call: enough for the tokenizer's threads, small enough for the progress bar."""


@dataclass(frozen=True)
class Split:
    """The samples of one split and the rows they go into."""

    store: SampleStore
    rows: list[list[int]]
    summary: SplitSummary


def prepare(locations: list[Location], encoder: Encoder, *, split: str, packing: bool) -> Split:
    """Read and encode a split whole; token shards come after all text.

    Errors: DataError if nothing is left of it.
    """
    shards = [location for location in locations if isinstance(location, TokenDirectory)]
    opened = [(location, open_tokens(location, len(encoder.tokenizer))) for location in shards]
    items = read_items([location for location in locations if location not in shards], encoder, split=split)
    store, tally = SampleStore(), Tally()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        for start in bar.track(range(0, len(items), CHUNK), description=f"tokenizing {split}") if items else ():
            for sample in encoder.encode(items[start : start + CHUNK], tally):
                store.append(sample)
        for location, manifest in opened:
            task = bar.add_task(f"reading {split}", total=len(manifest.shards))
            vocabulary = max(encoder.tokenizer.get_vocab().values()) + 1
            for _ in add_shards(location, manifest, store, tally, encoder.section.max_length, vocabulary):
                bar.advance(task)
    check_samples(store, tally, locations, split)
    lengths = store.lengths
    rows = pack(lengths, encoder.section.max_length) if packing else [[index] for index in range(len(store))]
    return Split(store, rows, describe(store, tally, rows, encoder, packing=packing))


def read_items(locations: list[Location], encoder: Encoder, *, split: str) -> list[Item]:
    """All contents of the sources, each of which must have some."""
    items: list[Item] = []
    for location in locations:
        before = len(items)
        items += read_contents(location, encoder.section, split=split)
        if len(items) == before:
            raise DataError(
                "no samples",
                where=str(location),
                rule="a source holds at least one sample",
                fix=f"another file as data.{split}, or null for none",
            )
    return items


def check_samples(store: SampleStore, tally: Tally, locations: Iterable[Location], split: str) -> None:
    """Refuse a split of which no sample carries loss."""
    if len(store):
        return
    named = ", ".join(str(location) for location in islice(locations, 3))
    if tally.masked:
        raise DataError(
            f"all {tally.masked} samples are masked: no token of data.{split} carries loss",
            where=tally.first_masked,
            rule="data.train_on=assistant trains assistant turns, within data.max_length, that are not masked",
            fix="a longer data.max_length, or data.train_on=all",
        )
    raise DataError(
        "no text", where=named, rule="a sample has at least two tokens", fix=f"longer texts as data.{split}"
    )


def describe(
    store: SampleStore, tally: Tally, rows: list[list[int]], encoder: Encoder, *, packing: bool, streamed: bool = False
) -> SplitSummary:
    """The summary of a split; padded batches are counted in the order of the file."""
    section, lengths = encoder.section, store.lengths
    if packing:
        whole = any(len(row) > 1 for row in rows)
        slots = len(rows) * section.max_length if whole else sum(lengths)
    else:
        size = section.batch_size
        batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
        slots = sum(len(batch) * max(batch) for batch in batches)
    return summarize(
        store,
        tally,
        rows=len(rows),
        slots=slots,
        template=encoder.template.name if encoder.chose_template else None,
        tokenizer=encoder.tokenizer,
        streamed=streamed,
    )
