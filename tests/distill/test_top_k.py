"""Distillation from a teacher's k likeliest tokens and one bucket for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qtrain.distill import chunked_loss
from qtrain.distill.divergence import Objective
from qtrain.distill.linear_divergence import linear_divergence, logits_divergence
from qtrain.distill.targets import TeacherLogits, TopK
from qtrain.distill.top_k import LEAST_REST

LOSSES = ["forward_kl", "reverse_kl", "jsd"]


def example(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's logits, labels."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, vocab, generator=random, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=random)
    labels[torch.rand(rows, generator=random) < 0.3] = -100
    return student, teacher, labels


def top(teacher: Tensor, k: int, temperature: float) -> TopK:
    log_probs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    return TopK(ids, log_probs)


def buckets(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log of (q at ids, the rest) [N, k + 1], by plain sums of probabilities."""
    q = (logits / temperature).softmax(-1)
    held = torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True)
    rest = q.masked_fill(held, 0).sum(-1, keepdim=True)
    return torch.cat((q.gather(-1, ids), rest), -1).log()


def judged(student: Tensor, teacher: Tensor, labels: Tensor, k: int, objective: Objective, judge: Any) -> Tensor:
    ids, t = top(teacher, k, objective.temperature).ids, objective.temperature
    pure = Objective(objective.loss, 1.0, 0.0, objective.jsd_beta)
    zeros = torch.where(labels == -100, labels, 0)
    of_buckets = judge(buckets(student, ids, t), buckets(teacher, ids, t), zeros, pure)
    entropy = F.cross_entropy(student, labels, ignore_index=-100, reduction="sum")
    return (1 - objective.ce_weight) * t**2 * of_buckets + objective.ce_weight * entropy


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(3, 20),
    below=st.integers(1, 19),
    chunk_rows=st.integers(1, 4),
    objective=st.builds(
        Objective, st.sampled_from(LOSSES), st.floats(0.5, 4), st.sampled_from([0.0, 0.25]), st.floats(0.05, 0.95)
    ),
    seed=st.integers(0, 10_000),
)
def test_value_and_gradient(
    rows: int, vocab: int, below: int, chunk_rows: int, objective: Objective, seed: int, judge: Any
) -> None:
    student, teacher, labels = example(rows, vocab, seed)
    k = max(1, vocab - below)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK_BYTES", chunk_rows * 4 * vocab)
        found = logits_divergence(ours, top(teacher, k, objective.temperature), labels, objective)
    expected = judged(theirs, teacher, labels, k, objective, judge)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_gradient_is_the_derivative(loss: str, k: int) -> None:
    student, teacher, labels = example(4, 6)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    objective = Objective(loss, 1.7, 0.2)
    held = top(teacher, k, 1.7)
    assert torch.autograd.gradcheck(lambda h, w: linear_divergence(h, w, held, labels, objective), (hidden, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_vocabulary_is_the_whole_divergence(loss: str) -> None:
    student, teacher, labels = example(12, 9)
    objective = Objective(loss, 1.3)
    grads = []
    for target in (TeacherLogits(teacher), top(teacher, 9, 1.3)):
        leaf = student.clone().requires_grad_()
        value = logits_divergence(leaf, target, labels, objective)
        value.backward()
        grads.append((value.detach(), leaf.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lower_bound_that_rises_with_k(loss: str) -> None:
    student, teacher, labels = example(50, 30)
    objective = Objective(loss)
    whole = float(logits_divergence(student, TeacherLogits(teacher), labels, objective))
    values = [float(logits_divergence(student, top(teacher, k, 1.0), labels, objective)) for k in range(1, 31)]
    assert values[0] > 0 and values == sorted(values)
    assert values[-1] == pytest.approx(whole, rel=1e-9) and values[0] < whole


@pytest.mark.parametrize("loss", LOSSES)
def test_fp16_log_probabilities_that_sum_to_more_than_1(loss: str) -> None:
    # A teacher that is sure: in fp16 the masses of its k tokens sum to 1 or more, the rest has none left.
    student, teacher, labels = example(40, 12)
    teacher = 12 * teacher
    held = top(teacher, 8, 1.0)
    rounded = TopK(held.ids.to(torch.uint8), held.log_probs.half())
    assert (rounded.log_probs.float().exp().sum(-1) >= 1).any()
    leaf = student.float().requires_grad_()
    value = logits_divergence(leaf, rounded, labels, Objective(loss))
    value.backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and value > 0
    torch.testing.assert_close(leaf.grad.sum(-1), torch.zeros(40), rtol=0, atol=1e-5)  # P and Q both sum to 1
    if loss != "reverse_kl":  # which weighs the teacher's log of the rest by the student's share of it
        exact = logits_divergence(student, held, labels, Objective(loss))
        assert float(value.detach()) == pytest.approx(float(exact), rel=2e-3)


def test_no_tensor_of_tokens_times_vocabulary_exists(largest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 300 * 5)
    hidden = torch.randn(64, 4, requires_grad=True)
    weight, labels = torch.randn(300, 4), torch.zeros(64, dtype=torch.int64)
    held = top(torch.randn(64, 300), 8, 1.0)
    with largest() as seen:
        linear_divergence(hidden, weight, held, labels, Objective()).backward()
    assert seen.bytes == 4 * 300 * 5


def test_a_student_equal_to_the_teacher_has_no_loss() -> None:
    _, teacher, labels = example(20, 15)
    for loss in LOSSES:
        held = top(teacher, 5, 1.0)
        assert float(logits_divergence(teacher, held, labels, Objective(loss))) == pytest.approx(0, abs=1e-9)
        rounded = TopK(held.ids, held.log_probs.half())
        assert 0 <= float(logits_divergence(teacher.float(), rounded, labels, Objective(loss))) / 20 < 1e-6


def test_the_least_rest_is_below_what_fp16_resolves() -> None:
    assert LEAST_REST < 2**-11
