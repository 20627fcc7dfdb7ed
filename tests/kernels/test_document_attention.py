"""Attention of documents one after the other beside attention under a mask of pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels.document_attention import document_attention, plain_document_attention, why_not_flash

CPU = torch.device("cpu")
LENGTHS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def filled(lengths: list[list[int]]) -> list[list[int]]:
    """Rows of the same length: the last document of the shorter ones is longer."""
    most = max(map(sum, lengths))
    return [[*row[:-1], row[-1] + most - sum(row)] for row in lengths]


def ends_of(lengths: list[list[int]], device: torch.device = CPU) -> Tensor:
    return torch.tensor([0, *(length for row in lengths for length in row)], device=device).cumsum(0).int()


def masked(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], scale: float | None = None) -> Tensor:
    """Written out: scores of all pairs, and those of other documents and of the future left out."""
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    seen = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None].to(query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return F.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value


def drawn(lengths: list[list[int]], heads: int, kv_heads: int, width: int, **options: object) -> list[Tensor]:
    """Queries, keys and values as linears leave them, [rows, tokens, heads, width] in memory, and dL/do."""
    torch.manual_seed(sum(map(sum, lengths)))
    shape = len(lengths), sum(lengths[0])
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(*shape, n, width, **options).transpose(1, 2) for n in counts]  # type: ignore[call-overload]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, groups=st.integers(1, 3), width=st.integers(1, 9), scale=st.sampled_from([None, 0.3]))
def test_each_document_sees_itself_alone(
    lengths: list[list[int]], groups: int, width: int, scale: float | None
) -> None:
    lengths = filled(lengths)
    *given, upper = drawn(lengths, 2 * groups, 2, width, dtype=torch.float64)
    query, key, value = (tensor.requires_grad_() for tensor in given)
    wanted = masked(query, key, value, lengths, scale)
    found = document_attention(query, key, value, ends_of(lengths), max(map(max, lengths)), scale)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(y, (query, key, value), upper) for y in (found, wanted))
    for one, own in zip(*gradients, strict=True):
        torch.testing.assert_close(one, own, rtol=1e-9, atol=1e-12)


def test_what_flash_attention_does_not_take_is_said() -> None:
    x = torch.zeros(1, 2, 4, 8)
    assert why_not_flash(x, x, x) == "no GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 96])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_on_a_gpu_within_the_rounding_of_bf16(width: int, kv_heads: int) -> None:
    """No farther from float64 than torch's attention under a mask."""
    device = torch.device("cuda")
    lengths = [[1, 300, 11, 200], [512], [129, 383]]
    given = drawn(lengths, 8, kv_heads, width, device=device, dtype=torch.bfloat16)
    *inputs, upper = given
    ends = ends_of(lengths, device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    assert why_not_flash(*leaves) is None
    found = document_attention(*leaves, ends, 512)
    own = [found.detach(), *torch.autograd.grad(found, leaves, upper)]

    def outcome(run: object, dtype: torch.dtype) -> list[Tensor]:
        again = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        y = run(*again)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, again, upper.to(dtype))]

    truth = outcome(lambda q, k, v: masked(q, k, v, lengths), torch.float64)
    other = outcome(lambda q, k, v: plain_document_attention(q, k, v, ends), torch.bfloat16)
    for exact, one, two in zip(truth, own, other, strict=True):
        assert one.dtype == torch.bfloat16
        distance = (one.double() - exact).norm() / exact.norm()
        assert distance <= 1.5 * (two.double() - exact).norm() / exact.norm() <= 0.02


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 20), (torch.bfloat16, 264)])
def test_others_run_by_torchs_own_on_a_gpu_too(dtype: torch.dtype, width: int) -> None:
    lengths = [[3, 5], [8]]
    *inputs, _ = drawn(lengths, 4, 2, width, device="cuda", dtype=dtype)
    assert why_not_flash(*inputs) is not None
    found = document_attention(*inputs, ends_of(lengths, torch.device("cuda")), 8)
    wanted = masked(*(tensor.double() for tensor in inputs), lengths)
    assert (found.double() - wanted).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()
