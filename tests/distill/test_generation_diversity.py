"""Figures of repetition on rows made by hand, and against plain counting."""

from __future__ import annotations

from collections import Counter

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qtrain.distill.generation.diversity import diversity, repeating


def test_rows_made_by_hand() -> None:
    rows = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 9]], dtype=np.uint16)
    found = diversity([rows[:2], rows[2:]], vocabulary=20, ends=[9])
    assert found.rows == 3 and found.tokens == 12
    assert found.distinct_1 == 6 / 12  # 1 2 3 4 5 9
    assert found.distinct_2 == 5 / 9  # 12 23 34 55 59
    assert found.distinct_3 == 4 / 6  # 123 234 555 559
    assert found.vocabulary_used == 6 / 20
    assert found.duplicates == 1
    assert found.ended == 1 / 3
    assert found.repetitive == 0


@pytest.mark.parametrize(
    "period,expected",
    [(1, True), (8, True), (31, True), (33, False), (64, False)],
)
def test_a_row_repeats_itself_if_one_8_gram_covers_a_quarter(period: int, expected: bool) -> None:
    # With period p > 8 the 8-gram at its beginning covers 8 of p tokens: a quarter at 32.
    row = np.arange(990) % period
    assert repeating(row[None].astype(np.uint16)).tolist() == [expected]


def test_only_the_share_of_the_whole_row_counts() -> None:
    rows = np.stack([np.arange(400), np.arange(400)])
    rows[0, :96] = 7
    rows[1, :104] = 7
    assert repeating(rows).tolist() == [False, True]


@given(arrays.arrays(np.uint32, st.tuples(st.integers(1, 6), st.integers(1, 30)), elements=st.integers(0, 3)))
def test_against_plain_counting(rows: NDArray[np.uint32]) -> None:
    found = diversity([rows], vocabulary=4, ends=[3])
    for size, value in ((1, found.distinct_1), (2, found.distinct_2), (3, found.distinct_3)):
        grams = [tuple(row[at : at + size]) for row in rows.tolist() for at in range(len(row) - size + 1)]
        assert value == (len(set(grams)) / len(grams) if grams else 0)
    assert found.duplicates == len(rows) - len({tuple(row) for row in rows.tolist()})
    assert found.vocabulary_used == len(set(rows.ravel().tolist())) / 4
    assert found.ended == np.mean([3 in row for row in rows.tolist()])
    for row, found_repeating in zip(rows.tolist(), repeating(rows).tolist(), strict=True):
        grams = [tuple(row[at : at + 8]) for at in range(len(row) - 7)]
        most = max(Counter(grams).values(), default=0)
        covers = [
            len({at + step for at, other in enumerate(grams) if other == gram for step in range(8)}) > len(row) / 4
            for gram in set(grams)
            if grams.count(gram) == most
        ]
        assert found_repeating in covers if covers else not found_repeating
