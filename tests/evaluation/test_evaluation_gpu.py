from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.evaluation.config import GenerateSection
from qtrain.evaluation.drift import drift
from qtrain.evaluation.flops import peak_flops
from qtrain.evaluation.generation import generate
from qtrain.evaluation.perplexity import perplexity

pytestmark = pytest.mark.gpu


def test_sampling_leaves_the_devices_generator_alone(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama.cuda()
    section = GenerateSection.model_validate({"strategy": "sample", "max_new_tokens": 8})
    state = torch.cuda.get_rng_state()
    first = generate(model, tiny_tokenizer, ["Hello", "The quick brown fox"], section)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(8, device="cuda")
    assert generate(model, tiny_tokenizer, ["Hello", "The quick brown fox"], section) == first


def test_models_on_two_devices_are_compared(tiny_llama: LlamaForCausalLM, tiny_llama_dir: str) -> None:
    rows = [torch.arange(100), torch.arange(100, 200)]
    there = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).cuda()
    result = drift(tiny_llama, there, rows, labels=rows)
    assert 0 <= result.kl < 1e-5 and result.tokens == 198
    assert result.candidate_perplexity == pytest.approx(perplexity(there, rows).perplexity, rel=1e-6)
    assert result.candidate_perplexity == pytest.approx(result.reference_perplexity, rel=1e-3)


def test_the_device_is_in_the_table_or_unknown() -> None:
    peak = peak_flops(torch.device("cuda"))
    assert peak is None or 5e13 < peak < 5e15
