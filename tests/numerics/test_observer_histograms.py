"""Histogram observers: exact counts, percentiles, the entropy calibration."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.numerics.observers.histogram import SMALLEST_EXPONENT, power_of_two
from qtrain.numerics.observers.kl import KLDivergence, least_divergence
from qtrain.numerics.observers.observer import Observer
from qtrain.numerics.observers.percentile import Percentile


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bounds(found: Observer) -> tuple[list[float], list[float]]:
    low, high = found.bounds()
    return low.tolist(), high.tolist()


def test_powers_of_two_are_exact() -> None:
    exponent = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponent).tolist() == [math.ldexp(1.0, e) for e in exponent.tolist()]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    symmetric=st.booleans(),
)
def test_every_number_is_counted_in_its_bin(values: list[float], symmetric: bool) -> None:
    found = Percentile(bits=8, symmetric=symmetric)
    for value in values:
        found.update(torch.tensor([[value]]))
    numbers = np.abs(np.array(values)) if symmetric else np.array(values)
    largest = max(abs(value) for value in values)
    exponent = max(math.frexp(largest)[1] if largest else SMALLEST_EXPONENT, SMALLEST_EXPONENT)
    assert found.exponent.tolist() == [exponent]
    width = math.ldexp(1.0, exponent) / 4096
    assert found.width().tolist() == [width]
    cells, counts = np.unique(np.floor(numbers / width), return_counts=True)
    # fp32 holds no quotient below 2^-149: a number so far below the others may be counted on zero's other side.
    if min((abs(value) for value in values if value), default=1.0) / width > 1e-38:
        nonzero = found.counts[0].nonzero()[:, 0]
        assert (nonzero + found.first).tolist() == cells.tolist()
        assert found.counts[0, nonzero].tolist() == counts.tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 3000),
    percent=st.sampled_from([50.0, 90.0, 99.0, 99.9, 99.99, 100.0]),
    symmetric=st.booleans(),
)
def test_a_percentile_lies_less_than_a_bin_outside_the_quantile(
    seed: int, count: int, percent: float, symmetric: bool
) -> None:
    x = normal(1, count, seed=seed) + 0.3
    found = Percentile(bits=8, symmetric=symmetric, percentile=percent)
    found.update(x)
    low, high = (ends[0] for ends in bounds(found))
    width = float(found.width())
    cut = (1 - percent / 100) * count / (1 if symmetric else 2)
    rank = count - math.floor(cut + 1e-6)
    ordered = (x.abs() if symmetric else x)[0].sort().values
    quantile = max(float(ordered[rank - 1]), 0.0)
    assert quantile <= high <= quantile + width
    if not symmetric:
        quantile = min(float(ordered[count - rank]), 0.0)
        assert quantile - width <= low <= quantile


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_percentiles_are_those_of_numpy(scale: float) -> None:
    x = normal(1, 100_000) * scale
    for percent in (99.0, 99.9, 99.99):
        found, two_sided = (Percentile(bits=8, symmetric=flag, percentile=percent) for flag in (True, False))
        for part in x.split(9999, dim=1):
            found.update(part), two_sided.update(part)
        width = float(found.width())
        rest = (100 - percent) / 2
        assert bounds(found)[1][0] == pytest.approx(np.percentile(x.abs().numpy(), percent), abs=3 * width)
        assert bounds(two_sided)[0][0] == pytest.approx(np.percentile(x.numpy(), rest), abs=20 * width)
        assert bounds(two_sided)[1][0] == pytest.approx(np.percentile(x.numpy(), 100 - rest), abs=20 * width)


# Least divergence


def divergence(counts: list[int], kept: int, levels: int) -> float:
    """KL(P || Q) for one threshold, word by word."""
    p = [float(count) for count in counts]
    p[0] = p[1]
    reference = p[:kept]
    reference[-1] += sum(p[kept:])
    candidate = [0.0] * kept
    for run in range(levels):
        members = [k for k in range(kept) if k * levels // kept == run and p[k] > 0]
        for k in members:
            candidate[k] = sum(p[k] for k in members) / len(members)
    if 2 * sum(candidate) < sum(p) or any(a > 0 and b == 0 for a, b in zip(reference, candidate, strict=True)):
        return math.inf
    n, m = sum(reference), sum(candidate)
    return sum(a / n * math.log(a / n * m / b) for a, b in zip(reference, candidate, strict=True) if a > 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), levels=st.sampled_from([2, 4, 8]), empty=st.sampled_from([0.0, 0.5, 0.9]))
def test_the_running_sums_find_the_least_divergence(seed: int, levels: int, empty: float) -> None:
    draw = random.Random(seed)
    counts = [0 if draw.random() < empty else int(draw.expovariate(0.02 * (k + 1))) for k in range(60)] + [0] * 4
    counts[draw.randrange(40, 60)] = 1
    kept = least_divergence(torch.tensor(counts), levels)
    end = max(k for k in range(1, 64) if counts[k]) + 1
    exact = {i: divergence(counts, i, levels) for i in range(levels, end + 1)}
    assert exact[kept] <= min(exact.values()) + 1e-9
    assert not any(exact[i] <= min(exact.values()) - 1e-9 for i in range(kept + 1, end + 1))


@pytest.mark.parametrize(("bits", "threshold"), [(8, 4.3444), (4, 3.5290)])
def test_the_entropy_calibration_is_that_of_modelopt(bits: int, threshold: float) -> None:
    # HistogramCalibrator(num_bits=bits).compute_amax("entropy") of nvidia-modelopt 0.47.0 for this tensor, whose
    # histogram has 2048 bins up to max|x|. The observer's bins are others and move its threshold: the minimum is flat.
    torch.manual_seed(0)
    x = torch.randn(100_000).abs()
    counts = torch.histc(x, bins=2048, min=0, max=float(x.max())).long()
    assert least_divergence(counts, 2 ** (bits - 1)) * float(x.max()) / 2048 == pytest.approx(threshold, abs=1e-4)


def test_numbers_that_stay_away_from_zero_are_not_cut_off() -> None:
    # The smallest level alone would tell itself perfectly: a threshold there has no divergence from what is left of it.
    levels = torch.tensor([-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0])
    observer = KLDivergence(bits=8, symmetric=True)
    observer.update(levels[torch.randint(0, 8, (1, 4096), generator=torch.Generator().manual_seed(0))] + 0.001)
    assert float(observer.bounds()[1]) > 6.9


def test_zeros_say_nothing_about_the_threshold() -> None:
    x = normal(1, 50_000)
    dense, sparse = (KLDivergence(bits=8, symmetric=True) for _ in range(2))
    dense.update(x)
    sparse.update(torch.cat([x, torch.zeros(1, 500_000)], dim=1))
    assert bounds(dense) == bounds(sparse)
