"""Searched scales: never worse than the largest weight's, better where it counts, bounded in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.numerics import row_parts
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec


def group_errors(x: torch.Tensor, qparams: QParams, spec: QuantSpec, importance: torch.Tensor) -> torch.Tensor:
    difference = (dequantize(quantize(x, qparams, spec), qparams, spec) - x).double()
    return (difference.square() * importance).unflatten(-1, (qparams.scale.shape[1], -1)).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    size=st.sampled_from([4, 16, 64]),
    weighted=st.booleans(),
    full_range=st.booleans(),
)
def test_the_error_of_no_group_exceeds_that_of_absmax(
    seed: int, bits: int, size: int, weighted: bool, full_range: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 64, generator=generator) * 0.02
    importance = torch.rand(64, generator=generator).square() if weighted else torch.ones(64)
    spec = QuantSpec(format=f"int{bits}", group_size=size, full_range=full_range)
    found = search_qparams(x, spec, importance if weighted else None)
    assert found.scale.dtype == torch.float16
    searched = group_errors(x, found, spec, importance)
    plain = group_errors(x, choose_qparams(x, spec), spec, importance)
    assert bool((searched <= plain * (1 + 1e-5)).all())


def test_rows_in_chunks_give_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2))
    whole = search_qparams(x, QuantSpec(group_size=16), importance)
    monkeypatch.setattr(row_parts, "PART", 100)
    assert torch.equal(search_qparams(x, QuantSpec(group_size=16), importance).scale, whole.scale)


def test_an_important_column_is_kept_exact_at_the_cost_of_the_others() -> None:
    x = torch.tensor([[1.0, 0.31, 0.22, 0.13]])
    spec = QuantSpec(format="int3", group_size=4)
    importance = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = search_qparams(x, spec, importance)
    back = dequantize(quantize(x, found, spec), found, spec)
    plain = choose_qparams(x, spec)
    assert abs(back[0, 1] - 0.31) < 0.01 < abs(dequantize(quantize(x, plain, spec), plain, spec)[0, 1] - 0.31)


def test_importance_is_checked() -> None:
    x, spec = torch.ones(2, 8), QuantSpec(group_size=8)
    with pytest.raises(ModelError, match=r"shape \[4\]"):
        search_qparams(x, spec, torch.ones(4))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match="mean of squares"):
            search_qparams(x, spec, torch.full((8,), bad))


def test_zeros_and_columns_without_importance_have_a_defined_scale() -> None:
    spec = QuantSpec(group_size=4)
    x = torch.cat([torch.zeros(2, 4), torch.ones(2, 4)], dim=1)
    found = search_qparams(x, spec, torch.zeros(8))
    assert torch.equal(found.scale, choose_qparams(x, spec).scale)
    assert torch.equal(quantize(x, found, spec)[:, :4], torch.zeros(2, 4, dtype=torch.int8))
