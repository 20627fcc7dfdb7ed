"""Head and loss in chunks against torch's cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qtrain.modules import linear_cross_entropy as module
from qtrain.modules.linear_cross_entropy import linear_cross_entropy


def example(
    rows: tuple[int, ...], width: int, vocab: int, *, bias: bool = True, masked: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    labels = torch.randint(0, vocab, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < masked] = -100
    return hidden, weight, torch.randn(vocab, generator=generator) if bias else None, labels


def judged(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: float = 1.0) -> list[Tensor]:
    """Value and gradients by torch alone, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    (loss * factor).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def found(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: float = 1.0) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2] if bias is not None else None)
    (loss * factor).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert torch.isfinite(mine).all()
        assert (mine.double() - other).norm() <= tolerance * other.norm().clamp(min=1e-30)


@pytest.mark.parametrize("chunk_bytes", [module.CHUNK_BYTES, 1, 4 * 11 * 3], ids=["one", "a-row", "three-rows"])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(chunk_bytes: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    case = example((4, 7), 16, 11, bias=bias)
    assert_equal(found(*case, factor=0.37), judged(*case, factor=0.37), 2e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    vocab=st.integers(2, 17),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.5]),
    chunk_rows=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
def test_any_shape(
    rows: tuple[int, ...], width: int, vocab: int, bias: bool, masked: float, chunk_rows: int, seed: int
) -> None:
    hidden, weight, b, labels = example(rows, width, vocab, bias=bias, masked=masked, seed=seed)
    labels.view(-1)[0] = vocab - 1  # at least one that counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_rows * 4 * vocab)
        ours = found(hidden, weight, b, labels)
    for mine, other in zip(ours, judged(hidden, weight, b, labels), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example((29,), 8, 13)
    whole = found(*case)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert_equal(found(*case), [value.double() for value in whole], 1e-6)


def test_rows_without_a_label_have_no_gradient() -> None:
    hidden, weight, bias, labels = example((12,), 8, 5, masked=0.5)
    assert (labels == -100).any() and (labels != -100).any()
    gradient = found(hidden, weight, bias, labels)[1]
    assert (gradient[labels == -100] == 0).all()
    assert (gradient[labels != -100] != 0).any(-1).all()


def test_all_rows_ignored_is_zero_and_no_nan() -> None:
    hidden, weight, bias, labels = example((6,), 8, 5, masked=2.0)
    assert (labels == -100).all()
    values = found(hidden, weight, bias, labels)
    assert len(values) == 4
    assert all((value == 0).all() for value in values)


def test_only_what_trains_gets_a_gradient() -> None:
    hidden, weight, _, labels = example((6,), 8, 5, masked=0.0)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None and weight.grad is None
    assert not linear_cross_entropy(hidden.detach(), weight, labels).requires_grad


def test_bf16_weights_give_a_loss_in_fp32() -> None:
    hidden, weight, _, labels = example((64,), 32, 50, bias=False)
    case = hidden.bfloat16(), weight.bfloat16(), None, labels
    ours = found(*case)
    assert (ours[0].dtype, ours[1].dtype, ours[2].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    # 2^-8 is bf16's rounding: of the logits in the value, of softmax and product in the gradients.
    assert_equal(ours[:1], judged(*case)[:1], 2**-9)
    assert_equal(ours[1:], judged(*case)[1:], 2**-7)


def test_under_autocast_products_run_in_its_dtype() -> None:
    case = example((64,), 32, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = found(*case)
    assert all(value.dtype == torch.float32 for value in ours)
    assert_equal(ours[:1], judged(*case)[:1], 2**-9)
    assert_equal(ours[1:], judged(*case)[1:], 2**-6)
    with pytest.raises(AssertionError):  # it is not fp32 that was multiplied
        assert_equal(ours[1:], judged(*case)[1:], 2**-12)


@pytest.mark.parametrize("chunks", [4, 64])
def test_a_gradient_in_16_bits_that_is_summed_in_chunks(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels = example((64,), 32, 50, bias=False, masked=0.0)
    case = hidden.bfloat16(), weight.bfloat16(), None, labels
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 // chunks * 4 * 50)
    ours = found(*case)
    assert_equal(ours[1:], judged(*case)[1:], 2**-7)


def test_places_that_are_known_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = torch.tensor([[1, -100, 3, 6, -100], [-100, -100, 0, 2, 5]])
    for known in (labels, labels.clamp(min=0)):
        kept, wanted = module.places_kept(known), linear_cross_entropy(hidden, weight, known)
        with monkeypatch.context() as patch:
            patch.setattr(module, "places_kept", lambda labels: pytest.fail("looked for"))
            assert torch.equal(linear_cross_entropy(hidden, weight, known, kept=kept), wanted)
