"""GPTQ against the recursion of the paper in fp64, against all codes there are, and against the nearest ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import QParams, choose_qparams, dequantize, quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import GptqSection, RtnSection
from qtrain.ptq.feedback import ErrorFeedback
from qtrain.ptq.gptq import Gptq, gptq_codes, output_error
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.scale_refit import refit_scales
from qtrain.ptq.start import Inputs

SPEC = QuantSpec(format="int3", group_size=8)
KINDS = {
    "symmetric": SPEC,
    "asymmetric": QuantSpec(format="int3", group_size=8, symmetric=False),
    "int8 asymmetric": QuantSpec(format="int8", group_size=8, symmetric=False),
    "int2 full range": QuantSpec(format="int2", group_size=4, full_range=True),
    "mid rise": QuantSpec(format="int2", group_size=8, mid_rise=True),
    "ternary": QuantSpec(format="ternary", group_size=8),
    "binary": QuantSpec(format="binary", group_size=8),
    "per channel": QuantSpec(format="int4", granularity="per_channel", group_size=None, symmetric=False),
}


def layer(seed: int, rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of that rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def levels(spec: QuantSpec) -> torch.Tensor:
    """All codes of a format, fp64."""
    if spec.format == "binary":
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return torch.arange(spec.quant_min, spec.quant_max + 1, dtype=torch.float64)


def surgeon(
    weight: torch.Tensor, qparams: QParams, hessian: torch.Tensor, spec: QuantSpec, order: str, damping: float = 0.01
) -> torch.Tensor:
    """Optimal brain surgeon, in fp64, row by row: each column to its nearest level, the rest by its share of the
    inverse, which then loses that column's row and column. No Cholesky factor, no blocks.
    """
    columns, size = weight.shape[1], weight.shape[1] // qparams.scale.shape[1]
    h = hessian.double()
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    sequence = list(range(columns))
    if order == "activation":
        sequence = torch.argsort(hessian.diagonal(), descending=True).tolist()
    current, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int8)
    for j in sequence:
        scale = qparams.scale[:, j // size].double()
        zero = 0.0 if qparams.zero_point is None else qparams.zero_point[:, j // size].double()[:, None]
        numbers = (levels(spec) - zero + (0.5 if spec.mid_rise else 0.0)) * scale[:, None]
        nearest = (numbers - current[:, j : j + 1]).abs().argmin(dim=1, keepdim=True)
        codes[:, j] = levels(spec)[nearest[:, 0]].to(torch.int8)
        error = (current[:, j] - numbers.gather(1, nearest)[:, 0]) / inverse[j, j]
        current -= error[:, None] * inverse[j]
        inverse -= inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
        inverse[j, j] = 1.0  # decided: nothing moves it any more
        inverse[j, [k for k in range(columns) if k != j]] = 0.0
        inverse[[k for k in range(columns) if k != j], j] = 0.0
    return codes


def exact_error(numbers: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    difference = numbers.double() - weight.double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_are_those_of_the_recursion(kind: str, order: str) -> None:
    spec = KINDS[kind]
    weight, hessian = layer(0, 24, 40, 60)
    qparams = search_qparams(weight, spec)
    expected = surgeon(weight, qparams, hessian, spec, order)
    fed, _ = ErrorFeedback.of(hessian, 0.01, order).decide(weight, qparams, spec)  # type: ignore[arg-type]
    # fp32 and fp64 part where a weight lies on a tie, and then for the rest of that row.
    assert int((fed == expected).all(dim=1).sum()) >= 23
    codes = gptq_codes(weight, qparams, hessian, spec, order=order)  # type: ignore[arg-type]
    plain = quantize(weight, qparams, spec)
    assert int(((codes == expected).all(1) | (codes == plain).all(1)).sum()) >= 23
    assert int((codes == expected).all(1).sum()) > 12


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian = layer(1, 16, 40, 60)
    qparams = choose_qparams(weight, KINDS["asymmetric"])
    feedback = ErrorFeedback.of(hessian)
    codes, _ = feedback.decide(weight, qparams, KINDS["asymmetric"], block=block)
    assert float((codes == feedback.decide(weight, qparams, KINDS["asymmetric"])[0]).float().mean()) > 0.99


@pytest.mark.parametrize("symmetric", [True, False])
def test_between_the_best_codes_there_are_and_the_nearest(symmetric: bool) -> None:
    spec = QuantSpec(format="int2", granularity="per_channel", group_size=None, symmetric=symmetric, full_range=True)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.int8)
    best = fed = nearest = 0.0
    for seed in range(20):
        weight, hessian = layer(seed, 1, 6, 3)
        qparams = search_qparams(weight, spec)
        numbers = (every.double() - (0 if symmetric else qparams.zero_point.double())) * qparams.scale.double()  # type: ignore[union-attr]
        codes = gptq_codes(weight, qparams, hessian, spec)
        least = float(exact_error(numbers, weight, hessian).min())
        own = float(exact_error(dequantize(codes, qparams, spec), weight, hessian))
        plain = float(exact_error(dequantize(quantize(weight, qparams, spec), qparams, spec), weight, hessian))
        assert least * (1 - 1e-9) <= own <= plain * (1 + 1e-6)
        best, fed, nearest = best + least, fed + own, nearest + plain
    assert fed - best < 0.5 * (nearest - best)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 9),
    size=st.sampled_from([1, 3, 8]),
    groups=st.integers(1, 6),
    rank=st.integers(0, 60),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    options=st.builds(
        GptqSection,
        order=st.sampled_from(["activation", "given"]),
        scales=st.sampled_from(["mse", "absmax"]),
        damping=st.sampled_from([1e-4, 0.01, 0.3]),
    ),
)
def test_no_row_is_worse_than_to_the_nearest(
    seed: int, rows: int, size: int, groups: int, rank: int, bits: int, symmetric: bool, options: GptqSection
) -> None:
    spec = QuantSpec(format=f"int{bits}", group_size=size, symmetric=symmetric)
    weight, hessian = layer(seed, size * groups, rows, rank)
    _, hessian = layer(seed, rows, size * groups, rank)
    weight = weight.t()  # not contiguous
    weight[0, :size] = 0
    hessian[-1], hessian[:, -1] = 0, 0
    record = Gptq(options).quantize(weight, spec, Inputs(hessian=hessian))
    assert record.codes.dtype == torch.int8
    assert spec.quant_min <= int(record.codes.min()) <= int(record.codes.max()) <= spec.quant_max
    assert record.scale.dtype == torch.float16
    assert bool(record.scale.isfinite().all() and (record.scale > 0).all())
    own = exact_error(record.dequantize(), weight, hessian)
    plain = exact_error(Rtn(RtnSection()).quantize(weight, spec, Inputs()).dequantize(), weight, hessian)
    noise = 1e-6 * float(hessian.diagonal().sum()) * float(weight.square().sum())
    assert bool((own <= plain * 1.001 + noise).all())


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
    # Nothing is known of the inputs: all columns count alike, as in a search without weights.
    unseen = Gptq(GptqSection()).quantize(weight, SPEC, Inputs(hessian=torch.zeros(16, 16)))
    assert torch.equal(unseen.scale, search_qparams(weight, SPEC).scale)


@pytest.mark.parametrize("columns", [16, 40])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    _, hessian = layer(6, 1, columns, 60)
    for order in ("activation", "given"):
        feedback = ErrorFeedback.of(hessian, 0.05, order)
        damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(columns)
        inverse = torch.linalg.inv(damped)
        factor = feedback.factor.double()
        assert torch.equal(factor, factor.triu())
        ordered = inverse[feedback.order][:, feedback.order]
        torch.testing.assert_close(factor.T @ factor, ordered, rtol=1e-4, atol=1e-6 * float(ordered.abs().max()))
        torch.testing.assert_close(feedback.saliency().double(), 1 / inverse.diagonal(), rtol=1e-4, atol=0)
    assert feedback.order.tolist() == list(range(columns))


def test_a_hessian_that_rounding_made_indefinite_is_damped_until_it_has_a_factor() -> None:
    weight, hessian = layer(7, 4, 16, 2)
    broken = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(16)
    assert float(torch.linalg.eigvalsh(broken + 0.01 * broken.diagonal().mean() * torch.eye(16)).min()) < 0
    assert bool(ErrorFeedback.of(broken).factor.isfinite().all())
    assert gptq_codes(weight, choose_qparams(weight, SPEC), broken, SPEC).shape == (4, 16)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "mid rise", "per channel"])
def test_refitted_scales_reach_the_least_squares_solution(kind: str) -> None:
    spec = KINDS[kind]
    exact = QuantSpec(**(spec.to_dict() | {"scale_dtype": "fp32"}))
    weight, hessian = layer(8, 6, 16, 40)
    qparams = choose_qparams(weight, exact)
    codes = quantize(weight, qparams, exact)
    ones = QParams(torch.ones_like(qparams.scale), qparams.zero_point)
    numbers = dequantize(codes, ones, exact)
    difference = dequantize(codes, qparams, exact) - weight
    found = refit_scales(numbers, difference, qparams.scale, hessian, exact, sweeps=200)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(16)).T
    size = 16 // qparams.scale.shape[1]
    for row in range(6):
        parts = torch.block_diag(*numbers[row].double().view(-1, size))
        solution = torch.linalg.lstsq(root @ parts.T, (root @ weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), solution, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 4), rank=st.integers(0, 20))
def test_refitted_scales_raise_no_rows_error(seed: int, bits: int, rank: int) -> None:
    spec = QuantSpec(format=f"int{bits}", group_size=4, symmetric=False, scale_dtype="bf16")
    weight, hessian = layer(seed, 5, 16, rank)
    weight[2, 4:8] = 0
    qparams = search_qparams(weight, spec)
    codes = gptq_codes(weight, qparams, hessian, spec)
    numbers = dequantize(codes, QParams(torch.ones_like(qparams.scale), qparams.zero_point), spec)
    before = dequantize(codes, qparams, spec)
    scale = refit_scales(numbers, before - weight, qparams.scale, hessian, spec)
    assert scale.dtype == torch.bfloat16
    after = dequantize(codes, QParams(scale, qparams.zero_point), spec)
    noise = 1e-6 * float(hessian.diagonal().sum()) * float(weight.square().sum())
    old, new = exact_error(before, weight, hessian), exact_error(after, weight, hessian)
    assert bool((new <= old * 1.001 + noise).all())


def test_a_weight_of_a_training_leaves_no_graph() -> None:
    weight, hessian = layer(9, 8, 16, 20)
    expected = Gptq(GptqSection()).quantize(weight, SPEC, Inputs(hessian=hessian))
    record: LinearRecord = Gptq(GptqSection()).quantize(torch.nn.Parameter(weight), SPEC, Inputs(hessian=hessian))
    assert not record.scale.requires_grad
    assert torch.equal(record.codes, expected.codes)
    assert torch.equal(record.scale, expected.scale)


def test_a_hessian_that_is_missing_or_does_not_fit_is_an_error() -> None:
    weight, hessian = layer(6, 8, 16, 4)
    qparams = choose_qparams(weight, SPEC)
    with pytest.raises(ModelError, match=r"\[15, 15\]"):
        gptq_codes(weight, qparams, hessian[1:, 1:], SPEC)
    with pytest.raises(ModelError, match="finite"):
        gptq_codes(weight, qparams, hessian * float("nan"), SPEC)
    with pytest.raises(ModelError, match="without the Hessian") as caught:
        Gptq(GptqSection()).quantize(weight, SPEC, Inputs(moment=torch.ones(16)))
    assert caught.value.rule and caught.value.fix
