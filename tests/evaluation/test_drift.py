from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from qtrain.errors import ModelError
from qtrain.evaluation import inference
from qtrain.evaluation.drift import drift
from qtrain.evaluation.perplexity import perplexity


def two_tables(vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(vocabulary, vocabulary, generator=generator)
    return reference, reference + 0.5 * torch.randn(vocabulary, vocabulary, generator=generator)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), chunk=st.integers(1, 60), share=st.floats(0.2, 1))
def test_equals_torch_distributions_in_float64(seed: int, chunk: int, share: float) -> None:
    p, q = two_tables(13, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (3, 10), generator=generator)
    labels = torch.where(torch.rand(3, 10, generator=generator) < share, ids, -100)
    labels[0, 1] = ids[0, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "CHUNK_ELEMENTS", chunk)
        result = drift(lambda ids: p[ids], lambda ids: q[ids], ids, labels=labels)

    counted = labels[:, 1:] != -100
    before, target = ids[:, :-1][counted], ids[:, 1:][counted]
    reference = torch.distributions.Categorical(logits=p.double()[before])
    candidate = torch.distributions.Categorical(logits=q.double()[before])
    assert result.tokens == counted.sum()
    assert result.kl == pytest.approx(torch.distributions.kl_divergence(reference, candidate).mean().item(), rel=1e-5)
    assert result.top1 == pytest.approx((p[before].argmax(-1) == q[before].argmax(-1)).double().mean().item())
    assert result.reference_perplexity == pytest.approx(reference.log_prob(target).mean().neg().exp().item(), rel=1e-6)
    assert result.candidate_perplexity == pytest.approx(candidate.log_prob(target).mean().neg().exp().item(), rel=1e-6)
    differences = reference.log_prob(target) - candidate.log_prob(target)
    spread = differences.std(correction=0).item() / len(target) ** 0.5
    assert result.spread == pytest.approx(spread, rel=1e-4, abs=1e-6)


def test_two_tokens_by_hand() -> None:
    """KL(3/4, 1/4 || 1/2, 1/2) = 3/4 ln 3/2 + 1/4 ln 1/2; the reverse would be 0.1438."""
    reference = torch.tensor([0.75, 0.25]).log()
    candidate = torch.tensor([0.25, 0.25]).log()
    result = drift(lambda ids: reference.expand(*ids.shape, 2), lambda ids: candidate.expand(*ids.shape, 2), [ROW])
    assert result.kl == pytest.approx(0.1308121, abs=1e-7)
    assert (result.top1, result.tokens) == (1.0, 3)
    assert result.candidate_perplexity == pytest.approx(2)


ROW = torch.tensor([0, 0, 1, 1])


def test_a_model_does_not_drift_from_itself(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    rows = [torch.arange(20), torch.arange(40, 60)]
    result = drift(tiny_llama, tiny_llama, rows)
    assert result.kl == 0 and result.top1 == 1
    assert result.reference_perplexity == result.candidate_perplexity == perplexity(tiny_llama, rows).perplexity
    assert tiny_llama.training
    assert result.to_dict()["tokens"] == 38


def test_a_token_that_both_rule_out_adds_nothing() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf])
    result = drift(lambda ids: logits.expand(*ids.shape, 3), lambda ids: logits.expand(*ids.shape, 3), [ROW])
    assert result.kl == 0
    narrow = torch.tensor([0.0, -torch.inf, 0.0])
    assert drift(lambda ids: logits.expand(*ids.shape, 3), lambda ids: narrow.expand(*ids.shape, 3), [ROW]).kl == float(
        "inf"
    )


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match="knows 2 tokens, the candidate 3"):
        drift(lambda ids: torch.zeros(*ids.shape, 2), lambda ids: torch.zeros(*ids.shape, 3), [ROW])
