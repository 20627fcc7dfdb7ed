"""GPTQ against a plain fp64 computation, and against rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.gptq import gptq_codes, output_error

SPEC = QuantSpec(format="int3", group_size=8)


def layer(seed: int, rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of that rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def column_by_column(
    weight: torch.Tensor, qparams: QParams, hessian: torch.Tensor, spec: QuantSpec, damping: float
) -> torch.Tensor:
    """The definition: after each column the rest is the least-squares optimum given what is decided."""
    columns = weight.shape[1]
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True).tolist()
    scale = qparams.scale.double().repeat_interleave(columns // qparams.scale.shape[1], dim=1)
    w, decided = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    current = w.clone()
    for step, j in enumerate(order):
        code = (current[:, j] / scale[:, j]).round().clamp(spec.quant_min, spec.quant_max)
        decided[:, j] = code
        done, rest = order[: step + 1], order[step + 1 :]
        if rest:
            error = decided[:, done] * scale[:, done] - w[:, done]
            move = -torch.linalg.solve(h[rest][:, rest], h[rest][:, done] @ error.T).T
            current[:, rest] = w[:, rest] + move
    return decided.to(torch.int8)


@pytest.mark.parametrize("block", [5, 8, 128])
def test_it_is_the_least_squares_rounding_of_the_definition(block: int) -> None:
    weight, hessian = layer(0, 16, 40, 60)
    qparams = choose_qparams(weight, SPEC)
    expected = column_by_column(weight, qparams, hessian, SPEC, 0.01)
    codes = gptq_codes(weight, qparams, hessian, SPEC, block=block)
    plain = quantize(weight, qparams, SPEC)
    better = output_error(weight, expected, qparams, hessian, SPEC) < output_error(
        weight, plain, qparams, hessian, SPEC
    )
    assert int(better.sum()) > 8
    same = (codes == torch.where(better[:, None], expected, plain)).float().mean()
    assert float(same) > 0.99  # fp32 and fp64 part where a weight lies on a tie


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    rank=st.integers(1, 60),
    bits=st.integers(2, 8),
)
def test_no_row_is_worse_than_to_the_nearest(seed: int, rows: int, groups: int, rank: int, bits: int) -> None:
    spec = QuantSpec(format=f"int{bits}", group_size=8, full_range=True)
    weight, hessian = layer(seed, rows, 8 * groups, rank)
    qparams = choose_qparams(weight, spec)
    codes = gptq_codes(weight, qparams, hessian, spec)
    assert codes.dtype == torch.int8
    assert spec.quant_min <= int(codes.min()) <= int(codes.max()) <= spec.quant_max

    def error(codes: torch.Tensor) -> torch.Tensor:
        difference = dequantize(codes, qparams, spec).double() - weight.double()
        return ((difference @ hessian.double()) * difference).sum(1)

    nearest = error(quantize(weight, qparams, spec))
    assert bool((error(codes) <= nearest * 1.001 + 1e-6).all())


def test_correlated_inputs_gain_much() -> None:
    weight, hessian = layer(3, 64, 64, 16)
    qparams = choose_qparams(weight, SPEC)
    fed = output_error(weight, gptq_codes(weight, qparams, hessian, SPEC), qparams, hessian, SPEC).sum()
    nearest = output_error(weight, quantize(weight, qparams, SPEC), qparams, hessian, SPEC).sum()
    assert fed < 0.5 * nearest


def test_uncorrelated_inputs_leave_the_nearest_codes() -> None:
    weight, _ = layer(4, 8, 16, 4)
    qparams = choose_qparams(weight, SPEC)
    codes = gptq_codes(weight, qparams, torch.diag(torch.rand(16) + 0.1), SPEC)
    assert torch.equal(codes, quantize(weight, qparams, SPEC))


def test_inputs_of_zeros_and_dead_columns_are_defined() -> None:
    weight, hessian = layer(5, 8, 16, 4)
    qparams = choose_qparams(weight, SPEC)
    zeros = gptq_codes(weight, qparams, torch.zeros(16, 16), SPEC)
    assert torch.equal(zeros, quantize(weight, qparams, SPEC))
    hessian[3], hessian[:, 3] = 0, 0
    assert gptq_codes(weight, qparams, hessian, SPEC).shape == (8, 16)


def test_a_hessian_that_does_not_fit_is_an_error() -> None:
    weight, hessian = layer(6, 8, 16, 4)
    qparams = choose_qparams(weight, SPEC)
    with pytest.raises(ModelError, match=r"\[15, 15\]"):
        gptq_codes(weight, qparams, hessian[1:, 1:], SPEC)
    with pytest.raises(ModelError, match="finite"):
        gptq_codes(weight, qparams, hessian * float("nan"), SPEC)
