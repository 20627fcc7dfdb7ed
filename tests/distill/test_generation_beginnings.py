"""First tokens: the whole vocabulary, each token with each greedy length, few rows already spread wide."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from qtrain.distill.generation.beginnings import beginnings, vocabulary_of
from qtrain.distill.generation.config import GenerateDataSection


@given(
    tokens=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 3),
)
def test_a_cycle_holds_each_pair_once_and_each_token_before_any_again(
    tokens: int, lengths: list[int], seed: int
) -> None:
    ids = np.arange(100, 100 + tokens)
    pairs = tokens * len(lengths)
    first, greedy = beginnings(ids, lengths, range(2 * pairs), seed)
    expected = {(token, length) for token in ids.tolist() for length in lengths}
    for cycle in range(2):
        part = slice(cycle * pairs, (cycle + 1) * pairs)
        assert set(zip(first[part].tolist(), greedy[part].tolist(), strict=True)) == expected
    for turn in range(2 * len(lengths)):
        assert set(first[turn * tokens : (turn + 1) * tokens].tolist()) == set(ids.tolist())


@given(begin=st.integers(0, 500), count=st.integers(1, 60))
def test_a_row_is_the_same_whatever_is_asked_beside_it(begin: int, count: int) -> None:
    ids = np.arange(37)
    whole = beginnings(ids, [3, 4, 5], range(600), 0)
    part = beginnings(ids, [3, 4, 5], range(begin, begin + count), 0)
    for one, other in zip(whole, part, strict=True):
        assert np.array_equal(one[begin : begin + count], other)


def test_the_seed_orders_them() -> None:
    ids = np.arange(1000)
    first, greedy = beginnings(ids, [3, 4, 5], range(1000), 0)
    assert not np.array_equal(first, beginnings(ids, [3, 4, 5], range(1000), 1)[0])
    assert not np.array_equal(first, np.sort(first))
    assert set(Counter(greedy.tolist()).values()) == {333, 334}


def test_special_tokens_begin_no_text_but_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("Paris!", special=False)])
    vocabulary = vocabulary_of(tokenizer)
    bos, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    tool, paris = tokenizer.convert_tokens_to_ids(["<tool>", "Paris!"])
    first = set(vocabulary.first.tolist())
    assert bos in first and paris in first
    assert not first & {end, pad, tool}
    assert vocabulary.prefix == ()
    assert vocabulary.size == len(tokenizer) == max(tool, paris) + 1


def test_bos_is_a_prefix_where_the_tokenizer_writes_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.prefix == (tokenizer.bos_token_id,)
    assert tokenizer.bos_token_id not in vocabulary.first


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"greedy_lengths": []}, "1 or more"),
        ({"greedy_lengths": [0, 3]}, "1 or more"),
        ({"length": 4}, "greedy_lengths go up to 5, a row has 4 tokens"),
    ],
)
def test_lengths_that_cannot_be(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GenerateDataSection(**keys)


def test_rows_are_whole() -> None:
    section = GenerateDataSection(tokens=1001, length=100, shard_tokens=250)
    assert (section.rows, section.shard_rows) == (11, 2)
