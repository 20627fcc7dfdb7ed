"""Distillation on a CUDA device: bf16 products, memory, and tensors that come from files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from qtrain.distill import chunked_loss
from qtrain.distill.cached import CacheKey
from qtrain.distill.divergence import Objective
from qtrain.distill.layerwise import distill_layerwise
from qtrain.distill.linear_divergence import linear_divergence
from qtrain.distill.targets import TeacherHead
from qtrain.distill.teacher import Teacher, snapshot
from qtrain.distill.token_loss import choose_cached, choose_online
from qtrain.distill.write_cache import write_cache
from qtrain.kernels import divergence

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
AUTOCAST = partial(torch.autocast, DEVICE, dtype=torch.bfloat16)


def batch(rows: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(DEVICE), "labels": ids.to(DEVICE), "rows": torch.arange(rows)}


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_bf16_products_against_float64(loss: str, judge: Any) -> None:
    torch.manual_seed(0)
    hidden, of_teacher = (torch.randn(300, 256).bfloat16() for _ in range(2))
    weight, teacher_weight = ((torch.randn(5000, 256) / 16).bfloat16() for _ in range(2))
    labels = torch.randint(0, 5000, (300,))
    objective = Objective(loss, temperature=2.0, ce_weight=0.2)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight)]
    teacher = TeacherHead(of_teacher.to(DEVICE), teacher_weight.to(DEVICE))
    found = linear_divergence(leaves[0], leaves[1], teacher, labels.to(DEVICE), objective)
    found.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = judge(F.linear(*exact), F.linear(of_teacher.double(), teacher_weight.double()), labels, objective)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert (leaf.grad.cpu().double() - other.grad).norm() < 2**-6 * other.grad.norm()


@pytest.mark.parametrize(("by", "matrices"), [("kernel", 1.8), ("plain", 6)])
def test_what_is_allocated_does_not_grow_with_tokens_times_vocabulary(
    by: str, matrices: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "plain":
        monkeypatch.setattr(divergence, "divergence_tiles", None)
    vocab, width, mib = 50_000, 64, 2**20
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 32 * mib)
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16)
    for tokens in (1000, 8000):
        hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_divergence(hidden, weight, TeacherHead(hidden.detach(), weight), labels, Objective()).backward()
        assert torch.cuda.max_memory_allocated() - before < matrices * 32 * mib  # one of 8,000 rows: 763


@pytest.mark.parametrize("vocab", [32_000, 32_003])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_the_kernel_against_pytorch(loss: str, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3000, 64).bfloat16(), (torch.randn(vocab, 64) / 8).bfloat16()
    teacher = TeacherHead(hidden.to(DEVICE), (weight + 0.05 * torch.randn_like(weight)).to(DEVICE))
    labels, found = torch.randint(0, vocab, (3000,), device=DEVICE), []
    for tiles in (divergence.divergence_tiles, None):
        monkeypatch.setattr(divergence, "divergence_tiles", tiles)
        leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight)]
        value = linear_divergence(leaves[0], leaves[1], teacher, labels, Objective(loss, 2.0, 0.2))
        value.backward()
        found.append((value.item(), *(leaf.grad for leaf in leaves)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for mine, other in zip(found[0][1:], found[1][1:], strict=True):
        assert (mine - other).norm() < 2**-7 * other.norm()


def test_online_and_cached_agree_under_autocast(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    teacher = Teacher(snapshot(tiny_llama, torch.bfloat16), AUTOCAST).to(DEVICE)
    student = tiny_llama.to(DEVICE)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    given = batch()

    def logits(numbers: list[int]) -> Any:
        return teacher.row_logits({"input_ids": given["input_ids"][numbers]}, [32] * len(numbers))

    cache = write_cache(tmp_path, range(4), logits, CacheKey("f", 0, 512))
    with AUTOCAST():
        online, path = choose_online(student, teacher, Objective())
        cached, cached_path = choose_cached(student, cache, Objective())
        assert path == "forward_kl from the teacher, a kernel in Triton, in chunks"
        assert cached_path == "forward_kl from cached logits, plain PyTorch, in chunks"
        values = []
        for loss in (online, cached):
            value = loss(given)
            value.backward()
            assert student.lm_head.weight.grad is not None
            values.append((value.item(), student.lm_head.weight.grad.clone()))
            student.zero_grad()
    (one, gradient), (other, other_gradient) = values
    assert other == pytest.approx(one, rel=1e-2)
    assert (gradient - other_gradient).norm() < 2e-2 * gradient.norm()


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_layer_by_layer(tiny_llama: LlamaForCausalLM, prefix: Any) -> None:
    teacher, student = snapshot(tiny_llama).to(DEVICE), tiny_llama.to(DEVICE)
    with torch.no_grad():
        for parameter in student.model.layers.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    found = distill_layerwise(
        teacher,
        student,
        batch(10)["input_ids"].cpu(),
        steps=30,
        lr=1e-3,
        batch_size=4,
        prefix=prefix,
        storage=torch.bfloat16,
        context=AUTOCAST,
    )
    assert all(block.after < 0.9 * block.before for block in found), found
