from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.errors import DataError, ModelError
from qtrain.evaluation.config import GenerateSection
from qtrain.evaluation.generation import Generation, generate

PROMPTS = ["The quick brown", "What is the capital of France?"]


def section(**keys: Any) -> GenerateSection:
    return GenerateSection(**{"chat": False, "max_new_tokens": 8, **keys})


@torch.no_grad()
def log_prob(model: LlamaForCausalLM, prompt: list[int], new: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(new)), new].sum())


@torch.no_grad()
def argmax_loop(model: LlamaForCausalLM, ids: list[int], steps: int) -> list[int]:
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.fixture
def sharp_llama(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Weights large enough that the likeliest token is no matter of rounding."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return tiny_llama


def test_greedy_is_the_argmax_loop_whatever_the_batch(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    together = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    apart = generate(sharp_llama, tiny_tokenizer, PROMPTS, section(), batch_size=1)
    assert together == apart
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer.prompt == prompt
        assert answer.tokens == argmax_loop(sharp_llama, tiny_tokenizer(prompt)["input_ids"], 8)
        assert answer.text == tiny_tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert not answer.finished


def test_beams_find_text_at_least_as_likely(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    greedy = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    beam = generate(sharp_llama, tiny_tokenizer, PROMPTS, section(strategy="beam", num_beams=2))
    gains = []
    for one, other in zip(greedy, beam, strict=True):
        ids = tiny_tokenizer(one.prompt)["input_ids"]
        gains.append(log_prob(sharp_llama, ids, other.tokens) - log_prob(sharp_llama, ids, one.tokens))
    assert min(gains) >= -1e-4
    assert max(gains) > 1e-4


def test_sampling_repeats_with_its_seed_and_leaves_the_generators_alone(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    state = torch.get_rng_state()
    first = generate(tiny_llama, tiny_tokenizer, PROMPTS, section(strategy="sample", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert generate(tiny_llama, tiny_tokenizer, PROMPTS, section(strategy="sample", seed=1)) == first
    assert generate(tiny_llama, tiny_tokenizer, PROMPTS, section(strategy="sample", seed=2)) != first


@pytest.mark.parametrize("keys", [{"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4, "top_k": 0}])
def test_each_limit_of_the_sampling_reaches_the_likeliest_token(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, keys: dict[str, float]
) -> None:
    sampled = generate(sharp_llama, tiny_tokenizer, PROMPTS, section(strategy="sample", **keys))
    assert sampled == generate(sharp_llama, tiny_tokenizer, PROMPTS, section())


def test_repetition_penalty_forbids_what_was_seen(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # The softmax of this model is nearly flat: a penalty of 100 puts every seen token behind all others.
    answers = generate(tiny_llama, tiny_tokenizer, PROMPTS, section(repetition_penalty=100.0, max_new_tokens=40))
    for answer in answers:
        seen = tiny_tokenizer(answer.prompt)["input_ids"]
        assert len(set(answer.tokens)) == len(answer.tokens)
        assert not set(answer.tokens) & set(seen)


def test_the_checkpoints_sampling_defaults_do_not_leak(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    own = sharp_llama.generation_config
    own.update(do_sample=True, temperature=9.0, top_k=7, repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=9)
    sharp_llama.config.use_cache = False
    sharp_llama.train()
    assert generate(sharp_llama, tiny_tokenizer, PROMPTS, section()) == expected
    assert sharp_llama.generation_config is own and own.temperature == 9.0
    assert sharp_llama.training and sharp_llama.config.use_cache is False


def test_text_ends_at_any_of_the_checkpoints_ending_tokens(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = generate(sharp_llama, tiny_tokenizer, PROMPTS[:1], section())[0].tokens
    last = next(at for at in range(1, 8) if whole[at] not in whole[:at])
    sharp_llama.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, whole[last]]
    answers = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    assert answers[0].tokens == whole[:last]
    assert answers[0].finished


def test_the_prompt_becomes_a_users_turn(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turn = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    as_text = generate(tiny_llama, tiny_tokenizer, [turn], section())[0].tokens
    for chat in (None, True):
        assert generate(tiny_llama, tiny_tokenizer, ["Hello"], section(chat=chat))[0].tokens == as_text
    assert generate(tiny_llama, tiny_tokenizer, ["Hello"], section())[0].tokens != as_text


def test_without_a_template_chat_is_an_error_and_the_default_is_plain_text(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(tiny_llama, tiny_tokenizer, ["Hello"], section())
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    assert generate(tiny_llama, tiny_tokenizer, ["Hello"], section(chat=None)) == plain
    with pytest.raises(ModelError, match="no chat template"):
        generate(tiny_llama, tiny_tokenizer, ["Hello"], section(chat=True))


def test_an_empty_prompt_starts_a_text_where_there_is_a_token_for_it(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert generate(tiny_llama, tiny_tokenizer, [""], section())[0].tokens == argmax_loop(tiny_llama, [0], 8)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(DataError, match="has no token"):
        generate(tiny_llama, tokenizer, [""], section())


def test_a_tokenizer_without_padding_serves(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    assert generate(sharp_llama, tokenizer, PROMPTS, section()) == expected


def test_nothing_to_do_gives_nothing(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    none: list[Generation] = []
    assert generate(tiny_llama, tiny_tokenizer, [], section()) == none


def test_adapters_of_peft_take_part(sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = generate(sharp_llama, tiny_tokenizer, PROMPTS, section())
    # PEFT asks the model for a name that transformers 5.23 renames.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(sharp_llama, LoraConfig(r=4, target_modules="all-linear"))
    model.base_model.model.generation_config.update(do_sample=True, temperature=9.0)
    assert generate(model, tiny_tokenizer, PROMPTS, section()) == plain
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert generate(model, tiny_tokenizer, PROMPTS, section()) != plain
