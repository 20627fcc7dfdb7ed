"""Divergences of rows of logits and their gradients: plain against float64, in one pass against the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtrain.distill import chunked_loss, targets
from qtrain.distill.divergence import Objective
from qtrain.distill.linear_divergence import linear_divergence, logits_divergence
from qtrain.distill.targets import TeacherHead, TeacherLogits
from qtrain.kernels import divergence
from qtrain.kernels.divergence import divergence_, divergence_tiles, plain
from qtrain.training.live_bytes import LiveBytes

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
tiles = pytest.mark.skipif(
    divergence_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)
Run = Callable[..., tuple[Tensor, Tensor]]

WAYS: list[dict[str, Any]] = [
    {"loss": "forward_kl", "temperature": 1.0, "ce_weight": 0.0, "jsd_beta": 0.5},
    {"loss": "reverse_kl", "temperature": 1.0, "ce_weight": 0.0, "jsd_beta": 0.5},
    {"loss": "jsd", "temperature": 1.0, "ce_weight": 0.0, "jsd_beta": 0.5},
    {"loss": "forward_kl", "temperature": 2.0, "ce_weight": 0.3, "jsd_beta": 0.5},
    {"loss": "reverse_kl", "temperature": 0.7, "ce_weight": 0.5, "jsd_beta": 0.5},
    {"loss": "jsd", "temperature": 3.0, "ce_weight": 0.1, "jsd_beta": 0.9},
    {"loss": "jsd", "temperature": 1.0, "ce_weight": 0.25, "jsd_beta": 0.1},
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w['loss']}-{w['temperature']}-{w['ce_weight']}")


def example(
    rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0, near: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, targets. With ``near`` the student is that far from the teacher, as it is in training."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if ON_GPU else "cpu"
    teacher = spread * torch.randn(rows, vocab, generator=generator)
    student = teacher + near * torch.randn(rows, vocab, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    return student.to(device, dtype), teacher.to(device, dtype), target.to(device)


def judged(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    loss: str,
    temperature: float,
    ce_weight: float,
    jsd_beta: float,
) -> tuple[Tensor, Tensor]:
    """By torch's own functions and autograd, in float64."""
    leaf = student.detach().double().requires_grad_()
    log_p = (teacher.double() / temperature).log_softmax(-1)
    log_q = (leaf / temperature).log_softmax(-1)

    def kl(of: Tensor, given: Tensor) -> Tensor:
        return F.kl_div(given, of, reduction="none", log_target=True).sum(-1)

    if loss == "forward_kl":
        rows = kl(log_p, log_q)
    elif loss == "reverse_kl":
        rows = kl(log_q, log_p)
    else:
        log_m = (jsd_beta * log_p.exp() + (1 - jsd_beta) * log_q.exp()).log()
        rows = jsd_beta * kl(log_p, log_m) + (1 - jsd_beta) * kl(log_q, log_m)
    entropy = F.cross_entropy(leaf, target, reduction="none", ignore_index=-100)
    losses = torch.where(target == -100, 0.0, (1 - ce_weight) * temperature**2 * rows + ce_weight * entropy)
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def assert_right(run: Run, student: Tensor, teacher: Tensor, target: Tensor, **way: Any) -> None:
    losses, gradient = judged(student, teacher, target, **way)
    tolerance, of_teacher = TOLERANCES[student.dtype], teacher.clone()
    found, slopes = run(student.clone(), teacher, target, **way)
    assert torch.equal(teacher, of_teacher) and found.dtype == torch.float32
    # A normalizer of ten is off by 1e-6, and T^2 magnifies it.
    assert torch.allclose(found.double(), losses, rtol=1e-5, atol=4e-6 * max(1.0, way["temperature"] ** 2))
    assert torch.allclose(slopes.double(), gradient, rtol=tolerance, atol=1e-6 + tolerance / 100)


@ways
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 333)])
def test_plain_against_float64(shape: tuple[int, int], dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert_right(plain, *example(*shape, dtype), **way)


@ways
def test_the_gradient_is_the_derivative(way: dict[str, Any]) -> None:
    student, teacher, target = example(3, 5, torch.float64)
    _, gradient = plain(student, teacher, target, **way)
    for place in ((0, 0), (1, 3), (2, 4)):
        moved = []
        for step in (1e-5, -1e-5):
            other = student.clone()
            other[place] += step
            moved.append(float(plain(other, teacher, target, **way)[0].sum()))
        assert float(gradient[place]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6, abs=1e-8)


@ways
def test_on_a_cpu_it_is_the_plain_one(way: dict[str, Any]) -> None:
    student, teacher, target = (tensor.cpu() for tensor in example(3, 5, torch.float32))
    kept = student.clone()
    assert not divergence.one_pass(student.device, student.dtype)
    for mine, other in zip(
        divergence_(student, teacher, target, **way), plain(kept, teacher, target, **way), strict=True
    ):
        assert torch.equal(mine, other)
    assert torch.equal(student, kept)


@tiles
@ways
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (2, 4096), (3, 4097), (2, 9011)])
def test_one_pass_against_float64(shape: tuple[int, int], dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert divergence_tiles is not None
    student, teacher, target = example(*shape, dtype)
    assert_right(divergence_tiles.divergence_, student, teacher, target, **way)
    _, gradient = divergence_tiles.divergence_(student, teacher, target, **way)
    assert gradient.data_ptr() == student.data_ptr(), "no other matrix"


@tiles
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 70),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    near=st.sampled_from([0.0, 0.01, 10.0]),
    way=st.fixed_dictionaries(
        {
            "loss": st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
            "temperature": st.floats(0.5, 4),
            "ce_weight": st.sampled_from([0.0, 0.25]),
            "jsd_beta": st.floats(0.05, 0.95),
        }
    ),
    masked=st.booleans(),
)
def test_any_shape_and_spread(
    rows: int, vocab: int, seed: int, spread: float, near: float, way: dict[str, Any], masked: bool
) -> None:
    assert divergence_tiles is not None
    student, teacher, target = example(rows, vocab, torch.float32, seed, spread, near)
    if masked:
        target[::2] = -100
    losses, gradient = judged(student, teacher, target, **way)
    found, slopes = divergence_tiles.divergence_(student, teacher, target, **way)
    assert torch.allclose(found.double(), losses, rtol=1e-4, atol=1e-4)
    assert torch.allclose(slopes.double(), gradient, rtol=1e-4, atol=1e-4)


@tiles
@ways
def test_teachers_of_another_dtype_and_strides(way: dict[str, Any]) -> None:
    assert divergence_tiles is not None
    student, teacher, target = example(4, 50, torch.float32)
    turned = teacher.t().contiguous().t().half()
    spaced = torch.stack((target, target), 1)[:, 0]
    assert not (turned.is_contiguous() or spaced.is_contiguous())
    assert_right(divergence_tiles.divergence_, student, turned, spaced, **way)
    with pytest.raises(AssertionError):
        divergence_tiles.divergence_(student.t().contiguous().t(), teacher, target, **way)


def runs() -> list[Run]:
    return [plain, *([divergence_tiles.divergence_] if divergence_tiles and (ON_GPU or INTERPRETED) else [])]


@pytest.mark.filterwarnings("ignore:overflow")  # over T < 1 the largest number becomes infinity, in the interpreter too
@ways
def test_words_that_one_or_both_rule_out(way: dict[str, Any]) -> None:
    """Zeros of the teacher's, the student's and both; the largest number of a dtype in place of infinity too."""
    student, teacher, target = example(4, 5000, torch.float32)
    target[:] = 0
    teacher[:, 10:20] = float("-inf")
    student[:, 15:30] = float("-inf")
    teacher[2, 40:60] = student[3, 50:70] = torch.finfo(torch.float32).min
    wanted = plain(student.double(), teacher.double(), target, **way)
    assert all(bool(part.isfinite().all()) for part in wanted)
    for run in runs():
        losses, gradient = run(student.clone(), teacher, target, **way)
        assert torch.allclose(losses.double(), wanted[0], rtol=1e-5, atol=1e-5)
        assert torch.allclose(gradient.double(), wanted[1], rtol=1e-4, atol=1e-6)
        assert bool((gradient[:, 15:20] == 0).all())


@ways
def test_rows_without_a_label_count_nothing_whatever_they_hold(way: dict[str, Any]) -> None:
    student, teacher, target = example(4, 5000, torch.float32)
    wanted = judged(student, teacher, target, **way)
    target[1] = target[3] = -100
    student[1] = teacher[3] = float("nan")
    for run in runs():
        losses, gradient = run(student.clone(), teacher, target, **way)
        assert bool((losses[1::2] == 0).all()) and bool((gradient[1::2] == 0).all())
        assert torch.allclose(losses[::2].double(), wanted[0][::2], rtol=1e-5)
        assert torch.allclose(gradient[::2].double(), wanted[1][::2], rtol=1e-4, atol=1e-6)


@ways
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_is_not_hidden(whose: str, way: dict[str, Any]) -> None:
    student, teacher, target = example(3, 5000, torch.float32)
    (student if whose == "student" else teacher)[1, 5] = float("nan")
    for run in runs():
        losses, gradient = run(student.clone(), teacher, target, **way)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(-1).tolist() == [False, True, False]
        assert not bool(gradient[::2].isnan().any())


@ways
def test_equal_logits_have_no_divergence(way: dict[str, Any]) -> None:
    student, _, target = example(3, 4500, torch.float32)
    pure = way | {"ce_weight": 0.0}
    for run in runs():
        losses, gradient = run(student.clone(), student.clone(), target, **pure)
        assert losses.abs().max() < 1e-5 and gradient.abs().max() < 1e-6


class Wide(TorchDispatchMode):
    """Numbers in the largest fp32 tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.numbers = max(self.numbers, leaf.numel())
        return result


def heads(dtype: torch.dtype) -> tuple[list[Tensor], TeacherHead, Tensor]:
    """Hidden states [13, 6], weight [70, 6] and bias that train; a teacher; labels, some of them missing."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda" if ON_GPU else "cpu", dtype)

    leaves = [normal(13, 6).requires_grad_(), normal(70, 6).requires_grad_(), normal(70).requires_grad_()]
    labels = torch.randint(0, 70, (13,), generator=generator)
    labels[torch.rand(13, generator=generator) < 0.3] = -100
    return leaves, TeacherHead(normal(13, 4), normal(70, 4), normal(70)), labels.to(leaves[0].device)


@tiles
@ways
def test_a_chunked_loss_by_the_kernel(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "one_pass", lambda *_: True)
    monkeypatch.setattr(targets, "one_pass", lambda *_: True)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 70 * 5)
    leaves, teacher, labels = heads(torch.float32)
    loss = linear_divergence(*leaves[:2], teacher, labels, Objective(**way), leaves[2])
    (loss / 7).backward()
    x, weight, bias = (leaf.detach().double() for leaf in leaves)
    of_teacher = F.linear(teacher.hidden.double(), teacher.weight.double(), teacher.bias.double())  # type: ignore[union-attr]
    losses, gradient = judged(F.linear(x, weight, bias), of_teacher, labels, **way)
    assert float(loss.detach()) == pytest.approx(float(losses.sum()), rel=1e-5)
    for leaf, wanted in zip(leaves, (gradient @ weight, gradient.t() @ x, gradient.sum(0)), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), wanted / 7, rtol=1e-4, atol=1e-5)
    whole = F.linear(*(leaf.detach() for leaf in leaves)).requires_grad_()
    kept = whole.detach().clone()
    other = logits_divergence(whole, TeacherLogits(of_teacher.float()), labels, Objective(**way))
    other.backward()
    assert torch.equal(whole, kept), "a graph may need them"
    assert whole.grad is not None
    torch.testing.assert_close(whole.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, loss)


@tiles
@ways
def test_no_matrix_in_fp32(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, teacher, labels = heads(torch.bfloat16)
    found = []
    for kernel in (True, False):
        monkeypatch.setattr(divergence, "one_pass", lambda *_, kernel=kernel: kernel)
        monkeypatch.setattr(targets, "one_pass", lambda *_, kernel=kernel: kernel)
        with Wide() as seen:
            linear_divergence(*leaves[:2], teacher, labels, Objective(**way), leaves[2]).backward()
        found.append(seen.numbers)
    kept = int((labels != -100).sum())
    assert found == [70 * 6, kept * 70], "the head's gradient alone"


def test_two_chunks_of_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's and the teacher's; nothing is computed, for the interpreter copies what it is given."""
    monkeypatch.setattr(targets, "one_pass", lambda *_: True)
    monkeypatch.setattr(targets, "divergence_", lambda logits, *_, **__: (logits[:, 0].float(), logits))
    chunk = 2 * 8 * 5000
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", chunk)
    device = "cuda" if ON_GPU else "cpu"
    hidden, weight = torch.randn(24, 4, device=device).bfloat16(), torch.randn(5000, 4, device=device).bfloat16()
    labels = torch.zeros(24, dtype=torch.int64, device=device)
    with LiveBytes() as counter:
        linear_divergence(hidden.requires_grad_(), weight, TeacherHead(hidden.detach(), weight), labels, Objective())
    assert 2 * chunk < counter.peak < 2.2 * chunk


@tiles
def test_chunks_have_the_rows_that_the_logits_dtype_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, teacher, labels = heads(torch.bfloat16)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 70 * 5)
    rows: list[int] = []

    def noted(logits: Tensor, *given: Any, **fields: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(logits))
        return plain(logits, *given, **fields)

    monkeypatch.setattr(targets, "divergence_", noted)
    for kernel in (True, False):
        monkeypatch.setattr(targets, "one_pass", lambda *_, kernel=kernel: kernel)
        linear_divergence(*leaves[:2], teacher, torch.where(labels < 0, 0, labels), Objective())
    assert rows == [10, 3, 5, 5, 3]
