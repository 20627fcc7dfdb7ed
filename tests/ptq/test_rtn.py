"""Rounding to the nearest: the record is choose_qparams and quantize, nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import RtnSection
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.start import Inputs


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    size=st.sampled_from([1, 3, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_weight_is_further_than_half_a_step(
    seed: int, bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[1] = 0
    spec = QuantSpec(format=f"int{bits}", group_size=size, symmetric=symmetric, scale_dtype="bf16")
    record = Rtn(RtnSection()).quantize(weight, spec, Inputs())
    assert record.codes.dtype == torch.int8
    assert (record.zero_point is None) == symmetric
    assert record.scale.shape == (5, 24 // size)
    assert record.scale.dtype == torch.bfloat16
    step = record.scale.double().repeat_interleave(size, dim=1)
    off = (record.dequantize().double() - weight.double()).abs() / step
    # bf16 rounds a scale by up to 2^-9 of it, a zero point by half a step: the outermost code may clip by that much.
    slack = 0.5 + (1 << bits) * 2.0**-8 + (0.0 if symmetric else 0.5)
    assert float(off.max()) <= slack
    assert torch.equal(record.dequantize()[1], torch.zeros(24))


def test_a_ternary_scale_is_the_mean_magnitude() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.9, 0.0]])
    record = Rtn(RtnSection()).quantize(weight, QuantSpec(format="ternary", group_size=4), Inputs())
    assert record.scale.item() == pytest.approx(0.3, rel=1e-3)
    assert record.codes.tolist() == [[0, -1, 1, 0]]


def test_a_parameter_leaves_no_graph_and_a_bad_weight_is_an_error() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8).t())
    record = Rtn(RtnSection()).quantize(weight, QuantSpec(group_size=4), Inputs())
    assert not record.scale.requires_grad
    with pytest.raises(ModelError, match="finite"):
        Rtn(RtnSection()).quantize(torch.full((2, 4), float("nan")), QuantSpec(group_size=4), Inputs())
