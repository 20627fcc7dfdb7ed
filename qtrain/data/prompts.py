"""Prompts for prediction: a sample up to the turn that the model is to write."""

from __future__ import annotations

from dataclasses import replace

from qtrain.data.contents import Item
from qtrain.data.encoding import Encoder
from qtrain.data.formats.record import Conversation, Document

Prompt = tuple[list[int], str]
"""Token ids of the prompt, and the reference text ("" if there is none)."""


def prompt_of(item: Item, encoder: Encoder) -> Prompt:
    """A chat up to its last assistant turn, which is the reference, with the generation prompt; a document whole."""
    content = item.content
    if isinstance(content, Document):
        return _ids(content.text, encoder), ""
    last = max((place for place, turn in enumerate(content.turns) if turn.role == "assistant"), default=None)
    reference = "" if last is None else content.turns[last].content
    asked: Conversation = replace(content, turns=content.turns[:last])
    return _ids(encoder.template.render(asked, prompt=True), encoder), reference


def _ids(text: str, encoder: Encoder) -> list[int]:
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
