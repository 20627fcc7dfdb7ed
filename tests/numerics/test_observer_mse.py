"""The range of least squared error beside brute force on the numbers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.numerics.observers.mse import MeanSquaredError, expected_error
from qtrain.numerics.observers.observer import Observer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(count: int, seed: int = 0) -> torch.Tensor:
    """One number of a thousand is a hundred times larger."""
    x = normal(1, count, seed=seed)
    x[:, ::1000] *= 100
    return x


def bounds(found: Observer) -> tuple[list[float], list[float]]:
    low, high = found.bounds()
    return low.tolist(), high.tolist()


def squared_error(x: torch.Tensor, start: float, step: float, levels: int) -> float:
    """Mean squared error of the levels start + k step on the numbers themselves."""
    x = x.double()
    code = ((x - start) / step).round().clamp(0, levels - 1)
    return float((start + code * step - x).square().mean())


def symmetric_error(x: torch.Tensor, high: float, bits: int) -> float:
    levels = 2**bits - 1
    return squared_error(x, -high, 2 * high / (levels - 1), levels)


def affine_error(x: torch.Tensor, low: float, high: float, bits: int) -> float:
    step = (high - low) / (2**bits - 1)
    return squared_error(x, -round(-low / step) * step, step, 2**bits)


DATA = {
    "normal": normal(1, 20_000),
    "laplace": torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(1, 20_000, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    ),
    "outliers": with_outliers(20_000),
    "relu": normal(1, 20_000).relu(),
    "shifted": normal(1, 20_000) + 1.5,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_threshold_of_a_dense_grid_errs_less(data: str, bits: int) -> None:
    x = DATA[data]
    found = MeanSquaredError(bits=bits, symmetric=True)
    found.update(x)
    chosen = symmetric_error(x, bounds(found)[1][0], bits)
    reach = float(x.abs().max())
    least = min(symmetric_error(x, reach * k / 400, bits) for k in range(4, 401))
    assert chosen <= least * 1.01  # what spreading the numbers inside their bins may cost
    assert chosen <= symmetric_error(x, reach, bits) * 1.0001


@pytest.mark.parametrize("data", ["normal", "outliers", "relu", "shifted"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_pair_of_ends_of_a_dense_grid_errs_less(data: str, bits: int) -> None:
    x = DATA[data][:, :5000]
    found = MeanSquaredError(bits=bits, symmetric=False)
    found.update(x)
    low, high = (ends[0] for ends in bounds(found))
    least_low, most_high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    least = min(
        affine_error(x, least_low * i / 30, most_high * k / 30, bits) for i in range(1, 31) for k in range(1, 31)
    )
    assert affine_error(x, low, high, bits) <= least * 1.02


def test_clipping_pays_at_few_bits_only() -> None:
    x = normal(1, 100_000)
    high = []
    for bits in (2, 3, 4, 8):
        found = MeanSquaredError(bits=bits, symmetric=True)
        found.update(x)
        high.append(bounds(found)[1][0])
    assert high == sorted(high)
    # Steps of the optimal uniform quantizers of N(0, 1) with 3, 7 and 15 levels, by integration of the density (the
    # first two are those of Max 1960, table II).
    assert high[:3] == pytest.approx([1.2240, 3 * 0.6508, 7 * 0.3534], rel=0.01)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    levels=st.integers(2, 40),
    start=st.floats(-60, 10),
    step=st.floats(0.3, 20),
)
def test_the_expected_error_is_the_integral_over_the_bins(seed: int, levels: int, start: float, step: float) -> None:
    counts = torch.randint(0, 9, (64,), generator=torch.Generator().manual_seed(seed))
    parts = 4000
    x = (torch.arange(64 * parts, dtype=torch.float64) + 0.5) / parts - 32
    code = ((x - start) / step).round().clamp(0, levels - 1)
    direct = ((start + code * step - x).square().reshape(64, parts).mean(1) * counts).sum()
    candidate = torch.tensor([start, start + 1.0], dtype=torch.float64), torch.tensor([step, step], dtype=torch.float64)
    assert float(expected_error(counts, -32, *candidate, levels)[0]) == pytest.approx(float(direct), rel=1e-4, abs=1e-4)
