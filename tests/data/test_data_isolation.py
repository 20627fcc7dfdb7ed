"""Packed documents get the logits they get alone, and the check notices a model that leaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from qtrain.data.collate import collate_packed
from qtrain.data.isolation import check_isolation
from qtrain.data.sample import Sample
from qtrain.errors import ModelError

ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3)


def sample(length: int, seed: int) -> Sample:
    ids = torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(ids, [-100, *ids[1:]])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation=request.param)


@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=ROWS)
def test_packed_logits_are_those_alone(llama: LlamaForCausalLM, training: bool, lengths: list[list[int]]) -> None:
    llama.train(training)
    rows = [[sample(length, 31 * r + d) for d, length in enumerate(row)] for r, row in enumerate(lengths)]
    batch = collate_packed(rows, pad=3, length=48)
    assert "attention_mask" not in batch
    inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    with torch.no_grad():
        packed = llama(**inputs, use_cache=False).logits
        for line, row in zip(packed, rows, strict=True):
            at = 0
            for document in row:
                alone = llama(input_ids=torch.tensor([document.input_ids]), use_cache=False).logits[0]
                part = line[at : at + len(document)]
                assert (part - alone).abs().max() <= 1e-5 * alone.abs().max()
                at += len(document)


def test_check_passes(llama: LlamaForCausalLM) -> None:
    state = torch.get_rng_state()
    llama.train()
    llama.model.norm.eval()
    check_isolation(llama, 300)
    assert llama.training
    assert not llama.model.norm.training
    assert torch.equal(torch.get_rng_state(), state)


def test_check_passes_in_bf16(tiny_llama: LlamaForCausalLM) -> None:
    check_isolation(tiny_llama.bfloat16(), 300)


class Leaky(nn.Module):
    """Ignores ``position_ids``: later documents see earlier ones."""

    def __init__(self, model: LlamaForCausalLM, *, only_later_rows: bool = False) -> None:
        super().__init__()
        self.model, self.only_later_rows = model, only_later_rows

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None
    ) -> SimpleNamespace:
        if self.only_later_rows and position_ids is not None:
            first = self.model(input_ids=input_ids[:1], position_ids=position_ids[:1], use_cache=use_cache).logits
            rest = self.model(input_ids=input_ids[1:], use_cache=use_cache).logits
            return SimpleNamespace(logits=torch.cat([first, rest]))
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=use_cache).logits)


@pytest.mark.parametrize("only_later_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_catches_a_leak(tiny_llama: LlamaForCausalLM, only_later_rows: bool, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="packed documents see each other") as caught:
        check_isolation(Leaky(tiny_llama.to(dtype), only_later_rows=only_later_rows), 300)
    assert "data.packing=false" in str(caught.value)


def test_padding_is_isolated_too(tiny_llama: LlamaForCausalLM) -> None:
    """Padding stands behind the documents and restarts at 0: whatever the padding token, logits stay the same."""
    rows = [[sample(5, 0), sample(6, 1)]]
    logits = []
    for pad in (3, 7):
        batch = collate_packed(rows, pad=pad, length=20)
        assert batch["position_ids"][0].tolist() == [*range(5), *range(6), *range(9)]
        with torch.no_grad():
            out = tiny_llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        logits.append(out.logits[:, :11])
    assert torch.equal(*logits)
