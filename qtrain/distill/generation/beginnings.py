"""How the texts begin: every token of the vocabulary, each with every length of the greedy part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ModelError


@dataclass(frozen=True)
class Vocabulary:
    """Which ids a text may begin with and hold.

    Attributes:
        first: ids that begin a text, ascending: all but the special ones. BOS is among them where the tokenizer does
            not write it itself: it begins the text the model holds likeliest, or a chat, which no other token does.
        prefix: BOS where the tokenizer itself puts it before each text, else nothing. Such models (Llama, Gemma) have
            hardly seen a text without it.
        size: ids lie below it. The rows of a model's head beyond the tokenizer stand for nothing and are not sampled.
    """

    first: NDArray[np.int64]
    prefix: tuple[int, ...]
    size: int


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Raises:
        ModelError: nothing but special tokens.
    """
    known = set(tokenizer.get_vocab().values())
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    bos = tokenizer.bos_token_id
    written = tokenizer("x")["input_ids"][:1] == [bos]
    first = known - special
    if not first:
        raise ModelError("the tokenizer has special tokens alone", rule="a text begins with an ordinary token")
    if bos is not None and not written:
        first.add(bos)
    return Vocabulary(np.array(sorted(first)), (bos,) if written else (), max(known) + 1)


def beginnings(
    first: NDArray[np.int64], greedy_lengths: Sequence[int], rows: range, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first tokens, lengths of the greedy part) of the rows with these numbers, each [rows].

    A permutation of all pairs in which every token comes once before any comes twice, so that few rows too spread over
    the vocabulary; after the last pair another permutation follows. Row n is the same however many rows there are.
    """
    numbers = np.arange(rows.start, rows.stop)
    tokens, lengths = len(first), np.asarray(greedy_lengths)
    cycle, place = np.divmod(numbers, tokens * len(lengths))
    turn, place = np.divmod(place, tokens)
    chosen = np.empty_like(numbers)
    for number in np.unique(cycle):
        order = np.random.default_rng([seed, 0, int(number)]).permutation(first)
        chosen[cycle == number] = order[place[cycle == number]]
    return chosen, lengths[(place + turn) % len(lengths)]
