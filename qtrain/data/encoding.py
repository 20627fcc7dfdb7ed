"""From contents to samples: rendering, tokenizing, masking, cutting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qtrain.data.config import DataSection
from qtrain.data.contents import Item
from qtrain.data.formats.record import Conversation, Document
from qtrain.data.sample import IGNORED, Sample
from qtrain.data.spans import SpanFinder
from qtrain.data.template import ChatTemplate, choose_template
from qtrain.errors import DataError, ModelError

T = TypeVar("T")
Encoded = tuple[list[int], NDArray[np.bool_]]
"""Token ids, and which of them are trained."""


@dataclass
class Tally:
    """What happened to the contents on their way; ``lengths`` are those before anything was cut or split."""

    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    tokens_cut: int = 0
    split_documents: int = 0
    masked: int = 0
    first_masked: str | None = None


class Encoder:
    """Encodes contents for one tokenizer under one data section.

    Args:
        keep_masked: keep samples that carry no loss, as prediction does.

    Errors: ModelError for a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: DataSection, *, keep_masked: bool = False) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for",
                rule="masks of assistant turns need a fast tokenizer (tokenizer.json)",
            )
        self.tokenizer, self.section, self._keep_masked = tokenizer, section, keep_masked

    @cached_property
    def template(self) -> ChatTemplate:
        """The template of chats, chosen when the first chat comes; it stays with the tokenizer when that is saved."""
        template = choose_template(self.tokenizer, self.section.chat_template)
        self.tokenizer.chat_template = template.source
        return template

    @property
    def chose_template(self) -> bool:
        """Whether a chat has come by."""
        return "template" in self.__dict__

    @cached_property
    def _finder(self) -> SpanFinder:
        return SpanFinder(self.template)

    def encode(self, items: Sequence[Item], tally: Tally) -> list[Sample]:
        """Samples in the order of the items; several for a document longer than ``data.max_length``."""
        samples: list[Sample] = []
        for is_chat, group in groupby(items, key=lambda item: isinstance(item.content, Conversation)):
            encode = self._chats if is_chat else self._documents
            samples += encode(list(group), tally)
        return samples

    def _documents(self, items: list[Item], tally: Tally) -> list[Sample]:
        """Windows of ``max_length``, none overlapping; a whole document ends with the end-of-text token.

        A plain text file gets no special token: its windows are those of the perplexity protocol of WikiText.
        """
        documents = [item.content for item in items if isinstance(item.content, Document)]
        encoded = self.tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)
        size, eos = self.section.max_length, self.tokenizer.eos_token_id
        samples = []
        for document, ids in zip(documents, encoded["input_ids"], strict=True):
            if document.ends and eos is not None:
                ids = [*ids, eos]
            tally.lengths.append(len(ids))
            tally.split_documents += len(ids) > size
            windows = [ids[start : start + size] for start in range(0, len(ids), size)]
            # A window of one token predicts nothing.
            samples += [Sample(w, [IGNORED, *w[1:]]) for w in windows if len(w) > 1 or self._keep_masked]
        return samples

    def _chats(self, items: list[Item], tally: Tally) -> list[Sample]:
        encoded = self._masked_by_tag(items) if self._by_tag else self._masked_by_span(items)
        samples = []
        for item, (ids, trained) in zip(items, encoded, strict=True):
            size = self.section.max_length
            tally.lengths.append(len(ids))
            if len(ids) > size:
                tally.truncated += 1
                tally.tokens_cut += len(ids) - size
            labels = np.where(trained, ids, IGNORED)[:size]
            labels[:1] = IGNORED
            if not self._keep_masked and not (labels != IGNORED).any():
                tally.masked += 1
                tally.first_masked = tally.first_masked or item.where
                continue
            samples.append(Sample(ids[:size], labels.tolist()))
        return samples

    @property
    def _by_tag(self) -> bool:
        return self.template.marks_generation and self.section.train_on == "assistant"

    def _masked_by_span(self, items: list[Item]) -> list[Encoded]:
        """One tokenization of the whole text; trained are the tokens that begin inside an assistant span."""
        texts, spans = [], []
        for item in items:
            text, found = _located(item, self._text_and_spans)
            texts.append(text)
            spans.append(found)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = []
        for ids, offsets, bounds in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            begins = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            trained = np.zeros(len(ids), dtype=bool)
            for start, end in bounds:
                trained |= (begins >= start) & (begins < end)
            rows.append((ids, trained))
        return rows

    def _text_and_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        text = self.template.render(conversation)
        if self.section.train_on == "all":
            return text, [(0, len(text))]
        spans = self._finder.find(conversation, text)
        return text, [(span.start, span.end) for span in spans if conversation.turns[span.turn].trained]

    def _masked_by_tag(self, items: list[Item]) -> list[Encoded]:
        """The mask of transformers, for templates that mark what the assistant generates with {% generation %}."""
        return [_located(item, self._ids_and_mask) for item in items]

    def _ids_and_mask(self, conversation: Conversation) -> Encoded:
        encoded = self.template.mark(conversation)
        trained = np.asarray(encoded["assistant_masks"], dtype=bool)
        flags = [turn.trained for turn in conversation.turns if turn.role == "assistant"]
        if not all(flags):
            begins = np.flatnonzero(np.diff(trained, prepend=False) & trained)
            if len(begins) != len(flags):
                raise DataError(
                    f"{len(flags)} assistant turns, but the template's generation tags give {len(begins)} stretches",
                    rule="a turn can be masked alone only if each has a stretch of its own",
                )
            for begin, end, flag in zip(begins, [*begins[1:], len(trained)], flags, strict=True):
                trained[begin:end] &= flag
        return encoded["input_ids"], trained


def _located(item: Item, function: Callable[[Conversation], T]) -> T:
    """``function`` of the item's conversation; an error learns where the item came from."""
    assert isinstance(item.content, Conversation)
    try:
        return function(item.content)
    except DataError as error:
        raise DataError(error.what, where=item.where, rule=error.rule, fix=error.fix) from None
