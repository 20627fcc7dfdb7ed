"""Chat templates: which one is used, and the text it gives."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qtrain.data.formats.record import Conversation, Turn
from qtrain.errors import DataError

log = logging.getLogger(__name__)
RULE = "data.chat_template is chatml, or a file with a Jinja template in UTF-8"
FIX = "data.chat_template=chatml, or without it the tokenizer's own"


class ChatTemplate:
    """A Jinja template with the special tokens of one tokenizer.

    Args:
        source: the Jinja text.
        name: how the report calls it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, name: str) -> None:
        self.tokenizer, self.source, self.name = tokenizer, source, name
        self.marks_generation = re.search(r"\{%-?\s*generation\b", source) is not None
        self._takes_tools = re.search(r"\btools\b", source) is not None

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The conversation as text; ``prompt`` opens the assistant's next turn at its end.

        Errors: DataError for a conversation that the template refuses (roles that do not alternate, say).
        """
        return str(self._apply(conversation, tokenize=False, add_generation_prompt=prompt))

    def mark(self, conversation: Conversation) -> dict[str, Any]:
        """``input_ids``, ``assistant_masks`` and ``offset_mapping`` of a template that has ``{% generation %}``."""
        encoded = self._apply(
            conversation,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        return dict(encoded)

    def _apply(self, conversation: Conversation, **options: Any) -> Any:
        conversation = self._with_tools(conversation)
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        tools = list(conversation.tools) if self._takes_tools and conversation.tools else None
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=self.source, **options)
        except Exception as error:  # what a template computes may raise anything, a division by zero too
            reason = (error.message if isinstance(error, jinja2.TemplateError) else None) or repr(error)
            raise DataError(
                f"the chat template refuses the conversation: {reason}",
                rule="roles here: " + ", ".join(turn.role for turn in conversation.turns),
                fix="data.chat_template=chatml takes any order of roles",
            ) from None

    def _with_tools(self, conversation: Conversation) -> Conversation:
        """Tools go into the system turn of a template without a place for them: a model must know what it may call."""
        if not conversation.tools or self._takes_tools:
            return conversation
        text = "Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        turns = conversation.turns
        if turns[0].role == "system":
            return Conversation((Turn("system", f"{turns[0].content}\n\n{text}"), *turns[1:]))
        return Conversation((Turn("system", text), *turns))


def choose_template(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> ChatTemplate:
    """``data.chat_template`` (chatml, or a Jinja file), else the tokenizer's own, else ChatML, which is then logged.

    Errors: DataError for a file that is missing or is no Jinja template.
    """
    if setting == "chatml":
        return ChatTemplate(tokenizer, chatml(tokenizer), "chatml")
    if setting is not None:
        return ChatTemplate(tokenizer, _read_jinja(Path(setting).expanduser()), setting)
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, tokenizer.get_chat_template(), "the tokenizer's own")
    log.warning("The tokenizer has no chat template: ChatML is used, and saved with the tokenizer.")
    return ChatTemplate(tokenizer, chatml(tokenizer), "chatml (the tokenizer has none)")


def chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for this tokenizer.

    A turn ends with ``<|im_end|>`` where that is a token, else with the end-of-text token, at which the model already
    stops. The text begins with BOS where the tokenizer itself puts one.
    """
    source = resources.files("qtrain.data").joinpath("templates/chatml.jinja").read_text(encoding="utf-8").strip()
    if tokenizer.eos_token and "<|im_end|>" not in tokenizer.get_vocab():
        source = source.replace("'<|im_end|>\\n'", "eos_token + '\\n'")
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("x")["input_ids"][0] == bos:
        source = "{{ bos_token }}" + source
    return source


def closing_of(template: ChatTemplate) -> str:
    """What the template writes after the last assistant turn: ``<|im_end|>\\n``; "" if it writes nothing."""
    marker = unused_character("")
    text = template.render(Conversation((Turn("user", "x"), Turn("assistant", marker))))
    return text.rpartition(marker)[2]


def header_of(template: ChatTemplate) -> str:
    """What the template writes to open an assistant turn: ``<|im_start|>assistant\\n``; "" if it writes nothing."""
    opening = Conversation((Turn("user", "x"),))
    return template.render(opening, prompt=True).removeprefix(template.render(opening))


def unused_character(text: str) -> str:
    """A character of the private use area that ``text`` does not hold: no template strips or splits at it."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """All special and added tokens, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def _read_jinja(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        # The tag {% generation %} is an extension of transformers, unknown to plain Jinja.
        jinja2.Environment(autoescape=True).parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source))
    except FileNotFoundError:
        raise DataError("no such file", where=f"data.chat_template={path}", rule=RULE, fix=FIX) from None
    except jinja2.TemplateSyntaxError as error:
        where = f"{path}:{error.lineno}"
        raise DataError(f"no Jinja template: {error.message}", where=where, rule=RULE, fix=FIX) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"no Jinja template: {error}", where=str(path), rule=RULE, fix=FIX) from None
    return source
