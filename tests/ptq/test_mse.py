"""Searched ranges as a starting point: less squared error than the extremes, weighted where the input was seen."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import MseSection, RtnSection
from qtrain.ptq.mse import Mse
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.start import Inputs


def group_errors(record: LinearRecord, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    difference = record.dequantize().double() - weight.double()
    weighted = difference.square() * moment.double()
    return weighted.view(len(weight), record.scale.shape[1], -1).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    size=st.sampled_from([2, 6, 24]),
    symmetric=st.booleans(),
    seen=st.booleans(),
)
def test_no_group_errs_more_than_from_its_extremes(
    seed: int, bits: int, size: int, symmetric: bool, seen: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 5, generator=generator).t()
    moment = torch.rand(24, generator=generator).square()
    spec = QuantSpec(format=f"int{bits}", group_size=size, symmetric=symmetric)
    inputs = Inputs(moment=moment if seen else None)
    weights = moment if seen else torch.ones(24)
    found = group_errors(Mse(MseSection()).quantize(weight, spec, inputs), weight, weights)
    plain = group_errors(Rtn(RtnSection()).quantize(weight, spec, inputs), weight, weights)
    assert bool((found <= plain * (1 + 1e-5)).all())


def test_it_finds_what_a_fine_search_finds() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(format="int3", group_size=32, scale_dtype="fp32")
    found = group_errors(Mse(MseSection()).quantize(weight, spec, Inputs()), weight, torch.ones(32))[:, 0]
    scales = torch.linspace(0.2, 1.2, 2000).double()[:, None, None] * weight.abs().amax(1).double()[None, :, None] / 3
    back = (weight.double() / scales).round().clamp(-3, 3) * scales
    best = (back - weight.double()).square().sum(-1).amin(0)
    assert float(found.sum()) <= float(best.sum()) * 1.03


def test_an_input_that_is_always_zero_weighs_nothing() -> None:
    weight = torch.tensor([[2.0, 0.9, -0.6, 0.3]])
    spec = QuantSpec(format="int3", group_size=4)

    def seen(moment: torch.Tensor | None) -> float:
        record = Mse(MseSection()).quantize(weight, spec, Inputs(moment=moment))
        return float((record.dequantize() - weight)[:, 1:].square().sum())

    assert seen(torch.tensor([0.0, 1.0, 1.0, 1.0])) < 0.05 * seen(None)
