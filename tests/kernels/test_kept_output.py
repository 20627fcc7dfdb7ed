"""Outputs that are kept: what is taken for the same, what is not, and when nothing is looked at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qtrain.errors import ModelError
from qtrain.kernels.kept_output import KeptOutput


def output(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_other_numbers_are_seen(rows: int, columns: int, dtype: torch.dtype) -> None:
    y = output(rows, columns, dtype)
    guard = KeptOutput()
    looked = guard.look(y)
    assert looked is not None and 1 <= len(looked) <= 3 * 4096 and not guard.seen
    y.mul_(1.01)  # as far as bf16 may be off, and more
    guard.check(y, looked)
    assert guard.seen and guard.look(y) is None
    again = KeptOutput()
    looked = again.look(y)
    assert looked is not None
    with pytest.raises(ModelError, match="written over before the gradient of its scales"):
        again.check(output(rows, columns, dtype).mul_(-0.5), looked)


def test_zeros_and_what_is_not_finite_are_left_to_others() -> None:
    for y in (torch.zeros(3, 4), torch.full((3, 4), float("nan"))):
        guard = KeptOutput()
        looked = guard.look(y)
        assert looked is not None
        guard.check(y, looked)


def test_shapes_alone_are_not_looked_at() -> None:
    assert KeptOutput().look(torch.empty(2, 3, device="meta")) is None
    assert KeptOutput().look(torch.empty(0, 3)) is None
    with FakeTensorMode():
        assert KeptOutput().look(torch.empty(2, 3)) is None
