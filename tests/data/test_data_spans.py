"""Assistant masks, judged by transformers' own mask over a twin of the template with {% generation %} tags."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qtrain.data.config import DataSection
from qtrain.data.contents import Item
from qtrain.data.encoding import Encoder, Tally
from qtrain.data.formats.record import Conversation, Turn
from qtrain.data.sample import IGNORED, Sample
from qtrain.data.template import ChatTemplate, choose_template
from qtrain.errors import DataError

# Each pair: a template, and its twin that marks what the assistant writes.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}G[{{ m.content }}<|im_end|>]G{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + PLAIN
)
TRIMS = PLAIN.replace("m.content", "m.content | trim")
# Earlier turns lose their thinking, the last opens with a (perhaps empty) block: not prefix-stable, as in Qwen3.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}G["
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].replace('<think>', '') if parts | length > 1 else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>{{ '\n' }}{% endif %}"
    "{{ parts[-1] }}<|im_end|>]G{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No header of its own for the assistant, and a space on both sides of its text, as in Llama 2.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %}G[ {{ m.content }} <|im_end|>]G"
    "{% else %}<|endoftext|>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TEMPLATES = {"plain": PLAIN, "default_system": DEFAULT_SYSTEM, "trims": TRIMS, "thinks": THINKS, "inst": INST}


def bare(template: str) -> str:
    return template.replace("G[", "").replace("]G", "")


def tagged(template: str) -> str:
    return template.replace("G[", "{% generation %}").replace("]G", "{% endgeneration %}")


def encode(tokenizer: PreTrainedTokenizerFast, template: str, turns: list[Turn], **options: Any) -> Sample:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, DataSection(max_length=10**6, **options))
    (sample,) = encoder.encode([Item(Conversation(tuple(turns)), "here")], Tally())
    return sample


def judged(tokenizer: PreTrainedTokenizerFast, template: str, turns: list[Turn]) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        chat_template=tagged(template),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def expected_labels(ids: list[int], mask: list[int]) -> list[int]:
    return [IGNORED, *(token if kept else IGNORED for token, kept in zip(ids[1:], mask[1:], strict=True))]


# Line breaks at the start of a content may merge with the header's into one token, which either side may claim.
CONTENTS = st.text(alphabet=st.sampled_from("abc XYZ.,é漢🙂\n<|>/"), min_size=1, max_size=30).filter(
    lambda text: not text[0].isspace()
)
PIECES = st.one_of(
    CONTENTS, st.sampled_from(["<|im_start|>assistant\nno", "a<|im_end|>\nb", "assistant", "<think>x</think>y"])
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=st.none() | CONTENTS, exchanges=st.lists(st.tuples(PIECES, CONTENTS), min_size=1, max_size=4))
def test_mask_is_transformers_mask(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, system: str | None, exchanges: list[tuple[str, str]]
) -> None:
    turns = [Turn("system", system)] if system else []
    for question, answer in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer)]
    ids, mask = judged(tiny_tokenizer, TEMPLATES[name], turns)
    for template in (bare(TEMPLATES[name]), tagged(TEMPLATES[name])):
        sample = encode(tiny_tokenizer, template, turns)
        assert sample.input_ids == ids
        assert sample.labels == expected_labels(ids, mask)


def test_answers_that_repeat_the_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        Turn("user", "same"),
        Turn("assistant", "same"),
        Turn("user", "<|im_start|>assistant\nsame<|im_end|>\n"),
        Turn("assistant", "a<|im_end|>\n<|im_start|>assistant\nb"),
    ]
    ids, mask = judged(tiny_tokenizer, PLAIN, turns)
    assert encode(tiny_tokenizer, bare(PLAIN), turns).labels == expected_labels(ids, mask)


def test_thinking_of_earlier_turns_is_gone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        Turn("user", "q1"),
        Turn("assistant", "<think>old</think>one"),
        Turn("user", "q2"),
        Turn("assistant", "<think>new</think>two"),
    ]
    sample = encode(tiny_tokenizer, bare(THINKS), turns)
    trained = tiny_tokenizer.decode([label for label in sample.labels if label != IGNORED])
    assert trained == "one<|im_end|><think>\nnew\n</think>\ntwo<|im_end|>"


@pytest.mark.parametrize("template", [bare(PLAIN), tagged(PLAIN)])
def test_untrained_turns(tiny_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    turns = [
        Turn("user", "q"),
        Turn("assistant", "one", trained=False),
        Turn("user", "r"),
        Turn("assistant", "two"),
        Turn("assistant", "three", trained=False),
    ]
    sample = encode(tiny_tokenizer, template, turns)
    assert tiny_tokenizer.decode([label for label in sample.labels if label != IGNORED]) == "two<|im_end|>"


def test_train_on_all(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn("user", "q"), Turn("assistant", "a")]
    sample = encode(tiny_tokenizer, tagged(PLAIN), turns, train_on="all")
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_turn_that_cannot_be_located(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    repeats = (
        "{% for m in messages %}{{ m.content }}{{ m.content | upper }}{% if m.content == 'a' %}!{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="here: turn 2 cannot be located") as caught:
        encode(tiny_tokenizer, repeats, [Turn("user", "q"), Turn("assistant", "a")])
    assert "data.train_on=all" in str(caught.value)


def test_template_that_refuses(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + bare(PLAIN)
    with pytest.raises(DataError, match="here: the chat template refuses the conversation: no system role"):
        encode(tiny_tokenizer, strict, [Turn("system", "s"), Turn("assistant", "a")])


def test_base_model_gets_chatml(tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, DataSection())
    items = [Item(Conversation((Turn("user", "q"), Turn("assistant", "a"))), "here")]
    (sample,) = encoder.encode(items, Tally())
    assert tokenizer.decode(sample.input_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    encoder.encode(items, Tally())
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "ChatML" in caplog.text
    assert tokenizer.chat_template == encoder.template.source


def test_chatml_without_its_tokens_ends_with_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A base tokenizer that has no <|im_end|>: turns end where the model already stops, and that token is trained."""
    state = tiny_tokenizer.backend_tokenizer.to_str().replace("<|im_end|>", "<eos>").replace("<|im_start|>", "<other>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(state), eos_token="<eos>"
    )
    sample = encode(tokenizer, choose_template(tokenizer, "chatml").source, [Turn("user", "q"), Turn("assistant", "a")])
    assert tokenizer.decode([label for label in sample.labels if label != IGNORED]) == "a<eos>"


def test_template_from_a_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(tagged(PLAIN))
    template = choose_template(tiny_tokenizer, str(path))
    assert template.marks_generation
    assert template.source == tagged(PLAIN)
    path.write_text("{% for m in messages %}\n{{ m. }}")
    with pytest.raises(DataError, match="mine.jinja:2: no Jinja template"):
        choose_template(tiny_tokenizer, str(path))
    with pytest.raises(DataError, match="no such file"):
        choose_template(tiny_tokenizer, str(tmp_path / "none.jinja"))


def test_tools_reach_the_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Conversation((Turn("user", "q"),), tools=({"name": "look_up"},))
    into_system = ChatTemplate(tiny_tokenizer, bare(PLAIN), "x").render(chat)
    assert into_system.startswith('<|im_start|>system\nTools:\n{"name": "look_up"}<|im_end|>')
    own_place = "{% for tool in tools %}[{{ tool.name }}]{% endfor %}" + bare(PLAIN)
    assert ChatTemplate(tiny_tokenizer, own_place, "x").render(chat).startswith("[look_up]<|im_start|>user")
