"""Distillation from hidden states and heads, in chunks, against the plain formulas in float64."""

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
from qtrain.distill.targets import TeacherHead, TeacherLogits
from qtrain.errors import ModelError

OBJECTIVES = [
    Objective("forward_kl"),
    Objective("reverse_kl"),
    Objective("jsd"),
    Objective("forward_kl", temperature=2.0, ce_weight=0.3),
    Objective("reverse_kl", temperature=0.7, ce_weight=0.5),
    Objective("jsd", temperature=3.0, ce_weight=0.1, jsd_beta=0.9),
]
names = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss}-{o.temperature}-{o.ce_weight}")


class Case:
    """Student and teacher of different widths over the same positions, in float64."""

    def __init__(self, rows: tuple[int, ...], vocab: int, *, bias: bool = True, masked: float = 0.3, seed: int = 0):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.hidden, self.weight = normal(*rows, 6), normal(vocab, 6)
        self.teacher = TeacherHead(normal(*rows, 4), normal(vocab, 4), normal(vocab) if bias else None)
        self.bias = normal(vocab) if bias else None
        self.labels = torch.randint(0, vocab, rows, generator=random)
        self.labels[torch.rand(rows, generator=random) < masked] = -100

    @property
    def teacher_logits(self) -> Tensor:
        return F.linear(self.teacher.hidden, self.teacher.weight, self.teacher.bias)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        given = [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]
        return [tensor.to(dtype).clone().requires_grad_() for tensor in given]

    def judged(self, judge: Any, objective: Objective, factor: float = 1.0) -> list[Tensor]:
        leaves = self.leaves(torch.float64)
        loss = judge(F.linear(*leaves), self.teacher_logits, self.labels, objective)
        (loss * factor).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def found(self, objective: Objective, dtype: torch.dtype, factor: float = 1.0) -> list[Tensor]:
        leaves = self.leaves(dtype)
        teacher = TeacherHead(
            self.teacher.hidden.to(dtype),
            self.teacher.weight.to(dtype),
            None if self.teacher.bias is None else self.teacher.bias.to(dtype),
        )
        loss = linear_divergence(leaves[0], leaves[1], teacher, self.labels, objective, *leaves[2:])
        (loss * factor).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)


@names
@pytest.mark.parametrize("chunk_bytes", [chunked_loss.CHUNK_BYTES, 1, 4 * 11 * 3], ids=["one", "a-row", "three-rows"])
def test_value_and_gradients(
    objective: Objective, chunk_bytes: int, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", chunk_bytes)
    case = Case((4, 7), 11)
    assert_near(case.found(objective, torch.float64, 0.37), case.judged(judge, objective, 0.37), 1e-12)
    assert_near(case.found(objective, torch.float32, 0.37), case.judged(judge, objective, 0.37), 1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    vocab=st.integers(2, 17),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 2.0]),
    chunk_rows=st.integers(1, 4),
    objective=st.builds(
        Objective,
        st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
        st.floats(0.5, 4),
        st.sampled_from([0.0, 0.25]),
        st.floats(0.05, 0.95),
    ),
    seed=st.integers(0, 10_000),
)
def test_any_shape(
    rows: tuple[int, ...],
    vocab: int,
    bias: bool,
    masked: float,
    chunk_rows: int,
    objective: Objective,
    seed: int,
    judge: Any,
) -> None:
    case = Case(rows, vocab, bias=bias, masked=masked, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK_BYTES", chunk_rows * 4 * vocab)
        ours = case.found(objective, torch.float64)
    assert_near(ours, case.judged(judge, objective), 1e-10)


@names
def test_the_gradient_is_the_derivative(objective: Objective) -> None:
    case = Case((3,), 5, masked=0.0)
    inputs = case.leaves(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_divergence(h, w, case.teacher, case.labels, objective, b), inputs
    )
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: logits_divergence(z, TeacherLogits(case.teacher_logits), case.labels, objective), (logits,)
    )


@names
def test_whole_logits_are_the_same_loss(objective: Objective) -> None:
    case = Case((4, 7), 11)
    leaves = case.leaves(torch.float64)
    loss = logits_divergence(F.linear(*leaves), TeacherLogits(case.teacher_logits), case.labels, objective)
    loss.backward()
    assert_near(
        [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)],
        case.found(objective, torch.float64),
        1e-12,
    )


@names
def test_it_is_zero_at_the_teacher_and_nowhere_below(objective: Objective) -> None:
    pure = Objective(objective.loss, objective.temperature, 0.0, objective.jsd_beta)
    case = Case((9,), 13)
    case.hidden, case.weight, case.bias = case.teacher.hidden, case.teacher.weight, case.teacher.bias
    same = case.found(pure, torch.float64)
    assert all(value.abs().max() < 1e-12 for value in same)
    assert Case((9,), 13, seed=1).found(pure, torch.float64)[0] > 0


def test_jsd_tends_to_the_two_kls() -> None:
    case, small = Case((9,), 13), 1e-6
    forward, reverse = (case.found(Objective(loss), torch.float64) for loss in ("forward_kl", "reverse_kl"))
    near_0 = case.found(Objective("jsd", jsd_beta=small), torch.float64, 1 / small)
    near_1 = case.found(Objective("jsd", jsd_beta=1 - small), torch.float64, 1 / small)
    for ours, theirs in zip(near_0[1:] + near_1[1:], forward[1:] + reverse[1:], strict=True):
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@names
def test_tokens_the_teacher_or_both_rule_out_leave_no_nan(objective: Objective, judge: Any) -> None:
    case = Case((6,), 8, masked=0.0)
    teacher, student = case.teacher_logits, F.linear(case.hidden, case.weight, case.bias)
    teacher[:, 3] = -torch.inf
    teacher[:, 5] = student[:, 5] = -torch.inf
    case.labels[:] = 1
    student.requires_grad_()
    loss = logits_divergence(student, TeacherLogits(teacher), case.labels, objective)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()
    if objective.loss == "forward_kl":
        both = [index for index in range(8) if index != 5]
        finite = teacher[:, both].masked_fill(torch.tensor(both) == 3, -1e9)
        torch.testing.assert_close(
            loss, judge(student[:, both], finite, case.labels, objective), rtol=1e-10, atol=1e-10
        )


def test_non_contiguous_inputs() -> None:
    case = Case((4, 7), 11, masked=0.0)
    objective = Objective()
    expected = linear_divergence(case.hidden, case.weight, case.teacher, case.labels, objective, case.bias)
    teacher = TeacherHead(
        case.teacher.hidden.mT.contiguous().mT, case.teacher.weight.T.contiguous().T, case.teacher.bias
    )
    turned = case.hidden.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = case.weight.T.contiguous().T
    labels = case.labels.T.contiguous().T
    assert not (turned.is_contiguous() or weight.is_contiguous() or labels.is_contiguous())
    loss = linear_divergence(turned, weight, teacher, labels, objective, case.bias)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(turned.grad, case.found(objective, torch.float64)[1])


def test_the_gradient_reaches_what_the_heads_weight_is_made_of(judge: Any) -> None:
    case, objective = Case((9,), 11), Objective()
    master = case.weight.clone().requires_grad_()

    def effective() -> Tensor:  # a straight-through fake quantization
        return master + ((master / 0.5).round() * 0.5 - master).detach()

    linear_divergence(case.hidden, effective(), case.teacher, case.labels, objective, case.bias).backward()
    ours, master.grad = master.grad, None
    judge(F.linear(case.hidden, effective(), case.bias), case.teacher_logits, case.labels, objective).backward()
    assert ours is not None
    torch.testing.assert_close(ours, master.grad)


def test_only_what_trains_gets_a_gradient() -> None:
    case = Case((6,), 5, masked=0.0)
    hidden = case.hidden.clone().requires_grad_()
    linear_divergence(hidden, case.weight, case.teacher, case.labels, Objective(), case.bias).backward()
    assert hidden.grad is not None
    assert case.weight.grad is case.bias.grad is case.teacher.weight.grad is None
    frozen = linear_divergence(case.hidden, case.weight, case.teacher, case.labels, Objective())
    assert not frozen.requires_grad


@names
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_no_tensor_of_tokens_times_vocabulary_exists(
    objective: Objective, masked: float, largest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((64,), 300, masked=masked)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 300 * 5)
    with largest() as seen:
        case.found(objective, torch.float32)
    assert seen.bytes == 4 * 300 * 6  # the weight's gradient; the logits of five rows are fewer
    with largest() as seen:
        F.linear(case.hidden.float(), case.weight.float())
    assert seen.bytes == 4 * 64 * 300


@names
def test_bf16_weights_give_a_loss_in_fp32(objective: Objective, judge: Any) -> None:
    case = Case((64,), 50)
    for part in ("hidden", "weight", "bias"):
        setattr(case, part, (getattr(case, part) / 2).bfloat16().double())
    case.teacher = TeacherHead(
        case.teacher.hidden.bfloat16().double(), case.teacher.weight.bfloat16().double() / 2, None
    )
    ours, theirs = case.found(objective, torch.bfloat16), case.judged(judge, objective)
    assert [value.dtype for value in ours] == [torch.float32, *[torch.bfloat16] * 3]
    for mine, other in zip(ours, theirs, strict=True):  # logits and softmax are rounded to 8 bits
        assert (mine.double() - other).norm() < 2**-6 * other.norm()


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "whole"])
def test_a_mean_over_tokens_is_not_rounded_before_it_scales(whole: bool) -> None:
    case = Case((64,), 50, bias=False, masked=0.0)
    weight, of_teacher = case.weight.bfloat16(), TeacherLogits(case.teacher_logits)
    given = F.linear(case.hidden.bfloat16(), weight) if whole else case.hidden.bfloat16()
    gradients = []
    for factor in (1.0, 1 / 1003):  # in bf16 it is 0.19 % larger
        leaf = given.clone().requires_grad_()
        if whole:
            loss = logits_divergence(leaf, of_teacher, case.labels, Objective())
        else:
            loss = linear_divergence(leaf, weight, of_teacher, case.labels, Objective())
        (loss * factor).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    assert (gradients[1].norm() / gradients[0].norm() * 1003).item() == pytest.approx(1, rel=3e-4)


def test_products_run_in_autocasts_dtype_as_the_heads_own() -> None:
    case = Case((16,), 11, masked=0.0)
    hidden, weight = case.hidden.float(), case.weight.float().requires_grad_()
    teacher = TeacherHead(case.teacher.hidden.float(), case.teacher.weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = logits_divergence(
            F.linear(hidden, weight),
            TeacherLogits(F.linear(teacher.hidden, teacher.weight)),
            case.labels,
            Objective(),
        )
        ours = linear_divergence(hidden, weight, teacher, case.labels, Objective())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    ours.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_another_vocabulary_is_refused_by_name() -> None:
    case = Case((3,), 7)
    with pytest.raises(ModelError, match=r"gives 7 logits, the teacher's 8\n.*\n.*resize"):
        linear_divergence(
            case.hidden, case.weight, TeacherHead(case.teacher.hidden, torch.zeros(8, 4)), case.labels, Objective()
        )
