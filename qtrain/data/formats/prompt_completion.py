"""`prompt_completion`: one question and its answer, as one user and one assistant turn."""

from __future__ import annotations

from qtrain.data.formats.record import Conversation, Fields, Turn, text_of
from qtrain.data.formats.registry import Format


class PromptCompletion(Format):
    """``{"prompt": ..., "completion": ...}``; ``data.columns={prompt: question, completion: answer}`` reads GSM8K."""

    keys = "prompt, completion"

    def fits(self, fields: Fields) -> bool:
        return "prompt" in fields and "completion" in fields

    def read(self, fields: Fields) -> Conversation:
        return Conversation((Turn("user", text_of(fields, "prompt")), Turn("assistant", text_of(fields, "completion"))))


PROMPT_COMPLETION = PromptCompletion()
