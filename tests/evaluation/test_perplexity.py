from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from qtrain.errors import DataError
from qtrain.evaluation import inference
from qtrain.evaluation.perplexity import perplexity, token_windows


def table(vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected_loss(logits: Tensor, rows: list[Tensor]) -> float:
    """Mean of -log p by the definition, one token at a time, in Python's float64."""
    losses = []
    for row in rows:
        for before, token in zip(row.tolist(), row.tolist()[1:], strict=False):
            scores = logits[before].double().tolist()
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[token])
    return sum(losses) / len(losses)


@given(count=st.integers(1, 100), length=st.integers(2, 40))
def test_windows_are_the_text_in_order(count: int, length: int) -> None:
    ids = list(range(count))
    if count < length:
        with pytest.raises(DataError, match="less than one window"):
            token_windows(ids, length)
        return
    windows = token_windows(ids, length)
    assert torch.cat(windows).tolist() == ids[: count // length * length]
    assert {len(window) for window in windows} == {length}


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(DataError, match="predicts nothing"):
        token_windows([1, 2, 3], 1)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(2, 9), chunk=st.integers(1, 40))
def test_equals_the_definition_for_every_chunking(rows: int, length: int, chunk: int) -> None:
    logits = table(11)
    ids = torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "CHUNK_ELEMENTS", chunk)
        result = perplexity(lambda ids: logits[ids], [ids[:1], *ids[1:]])
    assert result.loss == pytest.approx(expected_loss(logits, list(ids)), rel=1e-6)
    assert result.perplexity == math.exp(result.loss)
    assert result.tokens == rows * (length - 1)


def test_uneven_rows_weigh_by_their_tokens() -> None:
    logits = table(7)
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6, 0, 1])]
    assert perplexity(lambda ids: logits[ids], rows).loss == pytest.approx(expected_loss(logits, rows), rel=1e-6)


def test_uniform_logits_give_the_vocabulary_size_in_bf16_too() -> None:
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 1000, dtype=torch.bfloat16), [torch.arange(500)])
    assert result.perplexity == pytest.approx(1000, rel=1e-6)


def test_equals_the_loss_of_transformers(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 500, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_llama(input_ids=ids, labels=ids).loss.item()
    assert perplexity(tiny_llama, [ids]).loss == pytest.approx(expected, rel=1e-6)
    assert perplexity(tiny_llama.bfloat16(), [ids]).loss == pytest.approx(expected, rel=1e-2)


def test_every_module_keeps_its_mode(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    result = perplexity(tiny_llama, [torch.arange(16)])
    assert [module.training for module in tiny_llama.modules()] == modes
    assert result.to_dict() == {"loss": result.loss, "perplexity": result.perplexity, "tokens": 15}
    tiny_llama(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    def certain(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, 5) * 1e4

    result = perplexity(certain, [torch.tensor([0, 1, 2])])
    assert result.loss == pytest.approx(1e4)
    assert result.perplexity == math.inf


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to measure"):
        perplexity(lambda ids: ids, [])
