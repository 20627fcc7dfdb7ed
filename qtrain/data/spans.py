"""Where the assistant speaks in a rendered conversation, to the character.

Templates are programs: they insert system messages, trim contents, strip the thinking of earlier turns. So no text is
rendered twice with fewer turns and compared. Instead the content of one turn is replaced by a marker; what stands
before and after the marker then brackets that turn in the full text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qtrain.data.formats.record import Conversation
from qtrain.data.template import ChatTemplate, closing_of, header_of, special_tokens, unused_character
from qtrain.errors import DataError


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the text, which the turn with index ``turn`` wrote."""

    turn: int
    start: int
    end: int


class SpanFinder:
    """Finds assistant spans in the texts of one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._header = header_of(template)
        self._closing = closing_of(template)
        self._special = re.compile(r"\s*(" + "|".join(map(re.escape, special_tokens(template.tokenizer))) + ")")

    def find(self, conversation: Conversation, text: str) -> list[Span]:
        """Spans of the assistant turns in ``text``, in order; each runs from the end of the header, which the
        generation prompt supplies at inference, to the end of the end-of-turn token.

        A turn that the template leaves out has no span. Errors: DataError if a turn cannot be bracketed.
        """
        spans: list[Span] = []
        for index, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                span = self._find(conversation, text, index, spans[-1].end if spans else 0)
                if span:
                    spans.append(span)
        return spans

    def _find(self, conversation: Conversation, text: str, index: int, floor: int) -> Span | None:
        marker = unused_character(text)
        turns = list(conversation.turns)
        turns[index] = replace(turns[index], content=marker)
        before, found, after = self._template.render(replace(conversation, turns=tuple(turns))).partition(marker)
        if not found:
            return None
        start = self._start(before, floor)
        end = len(text) - len(after)
        if marker in after or start > end or not text.startswith(before[:start]) or not text.endswith(after):
            raise DataError(
                f"turn {index + 1} cannot be located in the text that the chat template makes",
                rule="what stands before and after a turn must not depend on its content",
                fix="data.train_on=all, data.chat_template=chatml, or {% generation %} tags in a template of your own",
            )
        return Span(index, start, self._end(text, end))

    def _start(self, before: str, floor: int) -> int:
        """The end of the header: a thinking block that the template opens by itself is the assistant's own text."""
        header = before.rfind(self._header, floor) if self._header else -1
        if header >= 0:
            return header + len(self._header)
        # Without a header the prompt ends at the user's turn: a space before the answer is the model's to write.
        return max(floor, len(before.rstrip(" ")))

    def _end(self, text: str, end: int) -> int:
        token = self._special.match(text, end)
        if token and (self._closing.strip() or token[1] == self._template.tokenizer.eos_token):
            return token.end()
        # A base model's tokenizer may know the end of a turn as plain text only.
        closing = self._closing.rstrip()
        return end + len(closing) if text.startswith(closing, end) else end
