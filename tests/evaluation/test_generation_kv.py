"""Text from a model with quantized keys and values is decoded with a cache of their codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.evaluation import generation
from qtrain.evaluation.config import GenerateSection
from qtrain.modules.kv.cache import QuantizedCache, quantized_cache
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import kv_quantizers, prepare_kv

PROMPTS = ["The quick brown", "What is the capital of France?", "user"]


@pytest.mark.parametrize(
    "section",
    [KVCacheSection(format="int4"), KVCacheSection(site="pre_rope", share="per_token", format="int4", symmetric=False)],
    ids=["after", "before"],
)
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_with_codes_and_from_scratch_alike(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    section: KVCacheSection,
    strategy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare_kv(tiny_llama, section)
    options = GenerateSection(strategy=strategy, max_new_tokens=10, chat=False)
    used: list[QuantizedCache] = []

    @contextmanager
    def watched(model: Any) -> Iterator[QuantizedCache]:
        with quantized_cache(model) as cache:
            yield cache
        used.append(cache)

    monkeypatch.setattr(generation, "quantized_cache", watched)
    found = generation.generate(tiny_llama, tiny_tokenizer, PROMPTS, options, batch_size=2)
    assert len(used) == 2 and all(cache.compression > 1 for cache in used)
    plain = generation.decoding
    monkeypatch.setattr(generation, "_cache", lambda model: nullcontext({}))
    monkeypatch.setattr(generation, "decoding", lambda *rest: _without_cache(plain(*rest)))
    assert generation.generate(tiny_llama, tiny_tokenizer, PROMPTS, options, batch_size=2) == found


def test_off_means_an_ordinary_cache(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerateSection(max_new_tokens=10, chat=False)
    expected = generation.generate(tiny_llama, tiny_tokenizer, PROMPTS, options)
    prepare_kv(tiny_llama, KVCacheSection(format="int2"))
    for _, quantizer in kv_quantizers(tiny_llama):
        quantizer.enabled = False
    monkeypatch.delattr(generation, "quantized_cache")
    assert generation.generate(tiny_llama, tiny_tokenizer, PROMPTS, options) == expected


def _without_cache(config: Any) -> Any:
    config.use_cache = False
    return config
