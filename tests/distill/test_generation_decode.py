"""Decoding: the greedy part is the model's own, the rest is drawn as it should be, and the cache changes nothing."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from qtrain.distill.generation.beginnings import Vocabulary, vocabulary_of
from qtrain.distill.generation.cache import PreallocatedLayer, preallocated_cache
from qtrain.distill.generation.config import GenerateDataSection
from qtrain.distill.generation.decode import Texts, decode, sample
from qtrain.distill.generation.shard import generate_shard, shard_steps
from qtrain.errors import ModelError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma": GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    # Every other layer sees 8 tokens, fewer than a row has.
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


def texts_of(first: list[int], length: int, greedy: int, seed: int = 0) -> Texts:
    ids = torch.zeros(len(first), length, dtype=torch.int64)
    ids[:, 0] = torch.tensor(first)
    uniforms = torch.from_numpy(np.random.default_rng(seed).random((len(first), length), dtype=np.float32))
    return Texts(ids, 1, torch.full((len(first),), greedy), uniforms)


def run(model: PreTrainedModel, texts: Texts, *, vocabulary: int, top_k: int = 50) -> Tensor:
    """The entropies; ``texts.ids`` are filled."""
    steps = decode(model, texts, vocabulary=vocabulary, temperature=1.0, top_k=top_k)
    columns = []
    while True:
        try:
            columns.append(next(steps))
        except StopIteration as end:
            assert columns == list(range(texts.given, texts.ids.shape[1]))
            entropies: Tensor = end.value
            return entropies


def shard(
    model: PreTrainedModel,
    source: PreTrainedTokenizerFast | Vocabulary,
    section: GenerateDataSection,
    number: int,
    rows: int,
) -> tuple[NDArray[np.int64], float | None]:
    vocabulary = source if isinstance(source, Vocabulary) else vocabulary_of(source)
    work = generate_shard(model, vocabulary, section, number, rows)
    steps = 0
    while True:
        try:
            next(work)
            steps += 1
        except StopIteration as end:
            assert steps == shard_steps(rows, vocabulary, section)
            result: tuple[NDArray[np.int64], float | None] = end.value
            return result


@torch.no_grad()
def without_cache(model: PreTrainedModel, texts: Texts, *, vocabulary: int, top_k: int) -> Tensor:
    """The same texts by whole forward passes."""
    ids = texts.ids[:, : texts.given]
    for column in range(texts.given, texts.ids.shape[1]):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1, :vocabulary]
        sampled, _ = sample(logits, texts.uniforms[:, column], temperature=1.0, top_k=top_k)
        chosen = torch.where(column < texts.greedy, logits.argmax(-1), sampled)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cache_changes_no_token(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32).eval()
    texts = texts_of(list(range(10, 16)), 24, greedy=3)
    run(model, texts, vocabulary=100)
    assert torch.equal(texts.ids, without_cache(model, texts, vocabulary=100, top_k=50))


def test_full_attention_is_laid_out_once_and_windows_stay_windows() -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["gemma2"])
    kinds = [isinstance(layer, PreallocatedLayer) for layer in preallocated_cache(model, 16).layers]
    assert kinds == [False, True]


def test_the_room_is_never_moved(tiny_llama: LlamaForCausalLM) -> None:
    cache = preallocated_cache(tiny_llama, 12)
    places = set()
    with torch.no_grad():
        for step in range(12):
            tiny_llama(input_ids=torch.full((2, 1), step), past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == step + 1 == cache.layers[0].keys.shape[2]
            places.add((cache.layers[0].keys.data_ptr(), cache.layers[1].values.data_ptr()))
    assert len(places) == 1


def test_the_greedy_part_is_what_the_model_generates(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    section = GenerateDataSection(length=16, greedy_lengths=[3, 4, 9], batch_size=7, seed=3)
    size = vocabulary_of(tiny_tokenizer).size
    assert size < tiny_llama.config.vocab_size
    ids, _ = shard(tiny_llama.eval(), tiny_tokenizer, section, 0, 20)
    # The ids that no token has are never generated here; there, they are suppressed.
    config = GenerationConfig(
        do_sample=False, max_length=9, pad_token_id=3, suppress_tokens=list(range(size, tiny_llama.config.vocab_size))
    )
    tiny_llama.generation_config = config
    judged = tiny_llama.generate(torch.from_numpy(ids[:, :1]), attention_mask=torch.ones(20, 1)).numpy()
    for row, other, length in zip(ids, judged, np.array([3, 4, 9])[np.arange(20) % 3], strict=True):
        assert row[:length].tolist() == other[:length].tolist()
    assert (ids[:, :9] != judged).any(), "what follows is drawn"


def test_every_sampled_token_is_among_the_likeliest(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    section = GenerateDataSection(length=24, greedy_lengths=[2], top_k=5)
    ids, entropy = shard(tiny_llama.eval(), tiny_tokenizer, section, 0, 40)
    size = vocabulary_of(tiny_tokenizer).size
    with torch.no_grad():
        logits = tiny_llama(input_ids=torch.from_numpy(ids)).logits[:, :-1, :size]
    ranks = (logits > logits.gather(2, torch.from_numpy(ids[:, 1:, None]))).sum(-1)
    assert int(ranks[:, 1:].max()) == 4, "the fifth is drawn, the sixth is not"
    assert int(ranks[:, :1].max()) == 0
    p = logits[:, 1:].topk(5).values.softmax(-1)
    assert entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
    assert ids.max() < size


def test_a_shard_is_decided_by_seed_and_number_alone(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    section = GenerateDataSection(length=12, shard_tokens=120, batch_size=4)
    model = tiny_llama.eval()
    second, _ = shard(model, tiny_tokenizer, section, 1, 10)
    torch.manual_seed(123)
    assert np.array_equal(second, shard(model, tiny_tokenizer, section, 1, 10)[0])
    assert not np.array_equal(second, shard(model, tiny_tokenizer, section, 0, 10)[0])
    other = section.model_copy(update={"seed": 1})
    assert not np.array_equal(second, shard(model, tiny_tokenizer, other, 1, 10)[0])
    # Nor do the rows beside a row matter, but for rounding, which decides nothing here.
    whole = section.model_copy(update={"batch_size": 10})
    assert np.array_equal(second, shard(model, tiny_tokenizer, whole, 1, 10)[0])
    assert np.array_equal(second[:3], shard(model, tiny_tokenizer, section, 1, 3)[0])


def test_bos_stands_first_where_the_tokenizer_puts_it(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    vocabulary = vocabulary_of(tiny_tokenizer)
    prefixed = Vocabulary(vocabulary.first[1:], (0,), vocabulary.size)
    section = GenerateDataSection(length=8, greedy_lengths=[3])
    ids, _ = shard(tiny_llama.eval(), prefixed, section, 0, 30)
    assert (ids[:, 0] == 0).all() and set(ids[:, 1]) <= set(prefixed.first.tolist())
    with torch.no_grad():
        greedy = tiny_llama(input_ids=torch.from_numpy(ids)).logits[..., : prefixed.size].argmax(-1).numpy()
    assert (ids[:, 2:4] == greedy[:, 1:3]).all(), "three tokens after BOS are greedy: the given one and two more"
    assert (ids[:, 4] != greedy[:, 3]).any()


@given(
    logits=arrays.arrays(np.float32, (4, 12), elements=st.floats(-20, 20, width=32)),
    uniforms=arrays.arrays(np.float32, (4,), elements=st.floats(0, 1, width=32, exclude_max=True)),
    top_k=st.integers(0, 15),
    temperature=st.floats(0.25, 4),
)
def test_sampling_inverts_the_distribution_function(
    logits: NDArray[np.float32], uniforms: NDArray[np.float32], top_k: int, temperature: float
) -> None:
    ids, entropy = sample(torch.from_numpy(logits), torch.from_numpy(uniforms), temperature=temperature, top_k=top_k)
    kept = min(top_k or 12, 12)
    for row, u, drawn, h in zip(logits.astype(np.float64), uniforms, ids, entropy, strict=True):
        order = np.argsort(-row, kind="stable")[:kept]
        assert row[int(drawn)] >= row[order[-1]]
        p = np.exp((row[order] - row[order[0]]) / temperature)
        p /= p.sum()
        before, upon = row[order] > row[int(drawn)], row[order] >= row[int(drawn)]
        if kept == 12:  # nothing is left out, so nothing is sorted: ids in their own order
            before, upon = order < int(drawn), order <= int(drawn)
        below, upto = p[before].sum(), p[upon].sum()
        assert below - 1e-5 <= u <= upto + 1e-5
        assert float(h) == pytest.approx(float(-(p[p > 0] * np.log(p[p > 0])).sum()), abs=1e-4)


def test_sampling_draws_by_probability() -> None:
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    uniforms = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    ids, _ = sample(p.log().expand(100_000, 4), uniforms, temperature=1.0, top_k=0)
    assert torch.allclose(torch.bincount(ids) / 100_000, p, atol=0.01)
    ids, _ = sample(p.log().expand(100_000, 4), uniforms, temperature=0.5, top_k=2)
    assert torch.allclose(torch.bincount(ids)[:1] / 100_000, torch.tensor([0.25 / 0.29]), atol=0.01)


def test_rows_beyond_the_context_are_refused(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ModelError, match="generate_data.length=512"):
        shard(tiny_llama, tiny_tokenizer, GenerateDataSection(length=513), 0, 1)


def test_a_model_without_finite_logits_is_refused(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        shard(tiny_llama.eval(), tiny_tokenizer, GenerateDataSection(length=8), 0, 2)


def test_too_many_rows_at_once_name_a_smaller_number(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_llama, "forward", full)
    with pytest.raises(ModelError, match="generate_data.batch_size=256"):
        shard(tiny_llama.eval(), tiny_tokenizer, GenerateDataSection(length=8), 0, 2)
