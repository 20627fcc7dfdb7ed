"""Packed rows document by document: the same loss and gradients as under a mask of pairs, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from qtrain.modules import documents
from qtrain.modules.documents import (
    DOCUMENTS,
    LONGEST,
    attend_by_document,
    attends_by_document,
    documents_of,
    known_rows,
    mask_pairs,
    with_documents,
)
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import prepare_kv, remove_kv
from qtrain.modules.token_loss import chunked_loss, plain_loss
from qtrain.training.recompute import Recompute

Decoder = Callable[..., PreTrainedModel]
Loss = Callable[..., Tensor]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2"]
IDS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))
ROWS = ((7, 13), (20,), (1, 5, 14))


def packed(rows: tuple[tuple[int, ...], ...] = ROWS) -> dict[str, Tensor]:
    positions = torch.tensor([[place for length in row for place in range(length)] for row in rows])
    return {"input_ids": IDS[: len(rows)], "labels": IDS[: len(rows)], "position_ids": positions}


def step(model: PreTrainedModel, batch: dict[str, Tensor], loss_of: Loss = chunked_loss) -> dict[str, Tensor]:
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    apart = {n: float((found[n] - own).norm() / own.norm().clamp(min=1e-20)) for n, own in wanted.items()}
    assert max(apart.values()) < 2e-6, apart


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Documents of each call of the kernel."""
    found: list[int] = []
    own = documents.document_attention

    def noted(*given: Any) -> Tensor:
        found.append(len(given[3]) - 1)
        return own(*given)

    monkeypatch.setattr(documents, "document_attention", noted)
    return found


def test_documents_are_found_where_positions_begin_again() -> None:
    batch = with_documents(packed())
    assert batch[DOCUMENTS].tolist() == [0, 7, 20, 40, 41, 46, 60] and batch[DOCUMENTS].dtype == torch.int32
    known = documents_of(batch)
    assert known is not None and (known.longest, known.rows, known.length) == (20, 3, 20)
    assert known.numbers().tolist() == [[0] * 7 + [1] * 13, [2] * 20, [3] + [4] * 5 + [5] * 14]
    assert len(known.carried()) == 20 and known.carried().untyped_storage().nbytes() == 7 * 4
    assert batch[LONGEST].numel() == 0
    assert documents_of(packed()) is None and DOCUMENTS not in with_documents({"input_ids": IDS})


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_under_a_mask(kind: str, decoder: Decoder, calls: list[int]) -> None:
    model = decoder(kind).train()
    wanted = step(model, packed())
    assert attend_by_document(model) and attends_by_document(model)
    assert_same(step(model, packed()), wanted)  # not told
    assert not calls
    assert_same(step(model, with_documents(packed())), wanted)
    assert calls == ([] if kind == "gemma3_text" else [6, 6])  # whose layers here see 8 tokens


@pytest.mark.parametrize(("window", "used"), [(19, []), (20, [6, 6])])
def test_a_window_wider_than_the_longest_document_is_none(
    window: int, used: list[int], decoder: Decoder, calls: list[int]
) -> None:
    model = decoder("mistral", sliding_window=window).train()
    wanted = step(model, packed())
    attend_by_document(model)
    assert_same(step(model, with_documents(packed())), wanted)
    assert calls == used


def test_chunks_are_no_windows(decoder: Decoder, calls: list[int]) -> None:
    """Llama 4's begin anew at multiples of their size, wherever a document is."""
    model = decoder("llama4_text", attention_chunk_size=20, num_local_experts=2, intermediate_size_mlp=96).train()
    wanted = step(model, packed(), plain_loss)
    assert attend_by_document(model)
    assert_same(step(model, with_documents(packed()), plain_loss), wanted)
    assert not calls


def test_sliding_layers_have_a_mask_beside_full_ones(decoder: Decoder, calls: list[int]) -> None:
    model = decoder("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=4).train()
    wanted = step(model, packed())
    attend_by_document(model)
    assert_same(step(model, with_documents(packed())), wanted)
    assert calls == [6]


def test_nothing_is_looked_for(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama")
    attend_by_document(model)
    own = masking_utils.find_packed_sequence_indices
    seen: list[Tensor] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: seen.append(ids) or own(ids))
    for loss in (chunked_loss, plain_loss):
        loss(model, with_documents(packed()))
    assert not seen
    chunked_loss(model, packed())
    assert len(seen) == 1
    with pytest.raises(ValueError, match="in between"), known_rows(model, with_documents(packed())):
        raise ValueError("in between")
    chunked_loss(model, packed())
    assert len(seen) == 2


def test_rows_of_one_document_take_the_causal_path(decoder: Decoder, calls: list[int]) -> None:
    model = decoder("llama")
    wanted = step(model, packed(((20,), (20,))))
    attend_by_document(model)
    assert_same(step(model, with_documents(packed(((20,), (20,))))), wanted)
    assert not calls


def test_recomputed_layers_are_given_the_documents_again(decoder: Decoder, calls: list[int]) -> None:
    model = decoder("llama").train()
    wanted = step(model, packed())
    attend_by_document(model)
    recompute = Recompute(model)
    for level, number in (("full", 4), ("none", 2)):
        recompute.set(level)
        calls.clear()
        assert_same(step(model, with_documents(packed())), wanted)
        assert len(calls) == number


def test_padded_rows_and_other_models_are_as_before(decoder: Decoder, calls: list[int]) -> None:
    model, other = decoder("llama"), decoder("llama")
    mask = torch.ones_like(IDS).index_fill_(1, torch.arange(15, 20), 0)
    padded = {"input_ids": IDS, "labels": IDS, "attention_mask": mask}
    wanted = step(model, padded)
    attend_by_document(model)
    assert_same(step(model, padded), wanted)
    assert_same(step(other, with_documents(packed())), step(other, packed()))  # one that finds breaks itself
    assert not calls
    caches = model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(caches, other.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False))


def test_dropout_and_unknown_scores_take_a_mask(decoder: Decoder, calls: list[int]) -> None:
    model = decoder("llama", attention_dropout=0.5)
    attend_by_document(model)
    model.eval()
    wanted = step(model, packed())
    assert_same(step(model, with_documents(packed())), wanted) and len(calls) == 2
    model.train()
    calls.clear()
    torch.manual_seed(0)
    wanted = step(model, packed())
    torch.manual_seed(0)
    assert_same(step(model, with_documents(packed())), wanted)
    assert not calls


@pytest.mark.parametrize("site", ["post_rope", "pre_rope"])
def test_quantized_keys_and_values_are_attended_to_by_document(site: str, decoder: Decoder, calls: list[int]) -> None:
    section = KVCacheSection(format="int8", site=site)
    model = decoder("llama").train()
    prepare_kv(model, section)
    wanted = step(model, packed())
    remove_kv(model)
    plain = step(model, packed())
    attend_by_document(model)
    prepare_kv(model, section)
    assert attends_by_document(model)
    assert_same(step(model, with_documents(packed())), wanted)
    assert len(calls) == 2
    mask_pairs(model)
    assert not attends_by_document(model)
    assert_same(step(model, with_documents(packed())), wanted)
    assert len(calls) == 2 and not torch.equal(wanted["loss"], plain["loss"])
    remove_kv(model)
    assert_same(step(model, with_documents(packed())), plain)


@pytest.mark.parametrize("attention", ["eager"])
def test_only_torchs_attention_is_taken_over(attention: str, decoder: Decoder) -> None:
    model = decoder("llama", attention)
    assert not attend_by_document(model) and model.config._attn_implementation == attention
    assert not attends_by_document(torch.nn.Linear(2, 2))


def test_a_saved_configuration_names_no_attention_of_ours(decoder: Decoder) -> None:
    model = decoder("llama")
    attend_by_document(model)
    assert documents.NAME not in model.config.to_json_string()
