"""Masks of rows that hold one sample each: as transformers makes them, but for the question."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, masking_utils

from qtrain.modules.token_loss import choose_loss, chunked_loss, plain_loss
from qtrain.modules.unbroken_rows import unbroken_rows

IDS = torch.arange(3, 27).view(2, 12)
PACKED = torch.arange(12).remainder(5).expand(2, 12)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Positions that transformers searched for breaks."""
    found: list[torch.Tensor] = []
    own = masking_utils.find_packed_sequence_indices

    def noted(position_ids: torch.Tensor) -> Any:
        found.append(position_ids)
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", noted)
    return found


def test_nothing_is_asked_and_nothing_changes(tiny_llama: LlamaForCausalLM, asked: list[torch.Tensor]) -> None:
    given = {"input_ids": IDS, "labels": IDS}
    wanted = tiny_llama(**given, use_cache=False).loss * 22
    assert asked
    asked.clear()
    for loss in (partial(plain_loss, tiny_llama), partial(chunked_loss, tiny_llama), choose_loss(tiny_llama)[0]):
        torch.testing.assert_close(loss(given), wanted, rtol=1e-5, atol=0)
    assert not asked


def test_packed_rows_are_kept_apart(tiny_llama: LlamaForCausalLM, asked: list[torch.Tensor]) -> None:
    given = {"input_ids": IDS, "labels": IDS, "position_ids": PACKED}
    packed, whole = chunked_loss(tiny_llama, given), chunked_loss(tiny_llama, {"input_ids": IDS, "labels": IDS})
    assert len(asked) == 1 and torch.equal(asked[0], PACKED)
    assert not torch.allclose(packed, whole, rtol=1e-4)


def test_it_is_as_before_afterwards(asked: list[torch.Tensor]) -> None:
    own = masking_utils.find_packed_sequence_indices
    with pytest.raises(ValueError, match="in between"), unbroken_rows({}):
        assert masking_utils.find_packed_sequence_indices(PACKED) is None
        raise ValueError("in between")
    assert masking_utils.find_packed_sequence_indices is own and not asked


def test_a_library_without_the_question_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with unbroken_rows({}):
        assert not hasattr(masking_utils, "find_packed_sequence_indices")
