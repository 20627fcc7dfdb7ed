"""Observers: ranges that do not depend on how the data came, and that are what they say they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

from qtrain.errors import ConfigError, ModelError
from qtrain.numerics.bounds import bounds_of
from qtrain.numerics.observers.histogram import SMALLEST_EXPONENT, Histogram, power_of_two
from qtrain.numerics.observers.kl import KLDivergence, least_divergence
from qtrain.numerics.observers.min_max import MinMax
from qtrain.numerics.observers.moving_average import MovingAverage
from qtrain.numerics.observers.mse import MeanSquaredError, expected_error
from qtrain.numerics.observers.observer import Observer
from qtrain.numerics.observers.percentile import Percentile
from qtrain.numerics.observers.registry import OBSERVERS

NAMES = OBSERVERS.names()
KINDS = [(name, symmetric) for name in NAMES for symmetric in (True, False) if symmetric or name != "kl"]
COUNTED = [(name, symmetric) for name, symmetric in KINDS if name in ("percentile", "mse", "kl")]
each_kind = pytest.mark.parametrize(("name", "symmetric"), KINDS)


def observer(name: str, symmetric: bool, *, bits: int = 8, groups: int = 1) -> Observer:
    return OBSERVERS.get(name)(bits=bits, symmetric=symmetric, groups=groups)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(count: int, seed: int = 0) -> torch.Tensor:
    """One number of a thousand is a hundred times larger."""
    x = normal(1, count, seed=seed)
    x[:, ::1000] *= 100
    return x


def bounds(found: Observer) -> tuple[list[float], list[float]]:
    low, high = found.bounds()
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == (found.groups,)
    return low.tolist(), high.tolist()


def batches_of(seed: int) -> list[torch.Tensor]:
    """Batches [2, n] of all sizes and magnitudes, empty ones and zeros among them."""
    draw = random.Random(seed)
    return [
        normal(2, draw.randrange(0, 40), seed=draw.randrange(1000)) * draw.choice([0.0, 1e-6, 0.3, 1.0, 7.0, 1e6])
        for _ in range(draw.randrange(1, 6))
    ] + [torch.ones(2, 1)]


# Whatever the observer


@each_kind
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), bits=st.integers(2, 8))
def test_the_range_holds_zero_and_does_not_exceed_what_was_seen(
    name: str, symmetric: bool, seed: int, bits: int
) -> None:
    found, batches = observer(name, symmetric, bits=bits, groups=2), batches_of(seed)
    for batch in batches:
        found.update(batch)
    low, high = found.bounds()
    everything = torch.cat(batches, dim=1)
    assert bool(torch.isfinite(low).all() and torch.isfinite(high).all())
    assert bool((low <= 0).all() and (high >= 0).all() and (high > low).all())
    if symmetric:
        assert torch.equal(low, -high)
        assert bool((high <= everything.abs().amax(dim=1)).all())
    else:
        assert bool((low >= everything.amin(dim=1).clamp(max=0)).all())
        assert bool((high <= everything.amax(dim=1).clamp(min=0)).all())


@pytest.mark.parametrize(("name", "symmetric"), [("min_max", True), ("min_max", False), *COUNTED])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), bits=st.integers(2, 8))
def test_the_order_and_the_sizes_of_batches_do_not_matter(name: str, symmetric: bool, seed: int, bits: int) -> None:
    batches = batches_of(seed)
    whole, shuffled = (observer(name, symmetric, bits=bits, groups=2) for _ in range(2))
    whole.update(torch.cat(batches, dim=1))
    random.Random(seed).shuffle(batches)
    for batch in batches:
        shuffled.update(batch)
    assert bounds(whole) == bounds(shuffled)
    if isinstance(whole, Histogram) and isinstance(shuffled, Histogram):
        assert torch.equal(whole.counts, shuffled.counts)
        assert torch.equal(whole.exponent, shuffled.exponent)


@each_kind
def test_each_group_has_the_range_it_would_have_alone(name: str, symmetric: bool) -> None:
    x = normal(5, 3000) * torch.tensor([1e-6, 0.1, 1.0, 30.0, 1e6])[:, None]
    together = observer(name, symmetric, bits=4, groups=5)
    for part in x.split(1000, dim=1):
        together.update(part)
    for group in range(5):
        alone = observer(name, symmetric, bits=4)
        for part in x.split(1000, dim=1):
            alone.update(part[group : group + 1])
        assert [ends[group] for ends in bounds(together)] == [ends[0] for ends in bounds(alone)]


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides_are_taken_as_the_fp32_numbers_they_are(
    name: str, symmetric: bool, dtype: torch.dtype
) -> None:
    x = normal(400, 3).to(dtype).t()
    assert not x.is_contiguous()
    strided, plain = (observer(name, symmetric, groups=3) for _ in range(2))
    strided.update(x)
    plain.update(x.float().contiguous())
    assert bounds(strided) == bounds(plain)


@each_kind
def test_zeros_alone_have_an_empty_range(name: str, symmetric: bool) -> None:
    found = observer(name, symmetric)
    found.update(torch.zeros(1, 100))
    assert bounds(found) == ([0.0], [0.0])


@each_kind
@pytest.mark.parametrize("value", [5.0, -0.3, 1.0, 1e-30, -1e-38, 3e38])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_constant_is_its_own_range(name: str, symmetric: bool, value: float, count: int) -> None:
    found = observer(name, symmetric)
    found.update(torch.full((1, count), value))
    low, high = (ends[0] for ends in bounds(found))
    reach = high if value > 0 or symmetric else -low
    # mse may choose any number of the constant's bin.
    assert reach == pytest.approx(abs(value), rel=0.01 if name == "mse" else 1e-6)
    if not symmetric:
        assert (low if value > 0 else high) == 0


@each_kind
def test_a_range_that_grows_a_trillionfold_forgets_nothing(name: str, symmetric: bool) -> None:
    found = observer(name, symmetric)
    for scale in (1e-6, 1e6, 1e-6):
        found.update(normal(1, 1000) * scale)
    assert found.count == 3000
    if isinstance(found, Histogram):
        assert int(found.counts.sum()) == 3000
    assert 1e4 < bounds(found)[1][0] < 1e7


@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused_and_leave_no_trace(name: str, symmetric: bool, bad: float) -> None:
    found = OBSERVERS.get(name)(bits=8, symmetric=symmetric, groups=3, where="layers.3.mlp")
    found.update(normal(3, 50))
    before, count = bounds(found), found.count
    x = normal(3, 50) * 9
    x[1, 7] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.mlp: 1 of 3 groups hold NaN or inf .* group 1"):
        found.update(x)
    assert (bounds(found), found.count) == (before, count)


@each_kind
def test_fp64_numbers_beyond_fp32_are_refused(name: str, symmetric: bool) -> None:
    with pytest.raises(ModelError, match="finite in fp32"):
        observer(name, symmetric).update(torch.tensor([[1e300]], dtype=torch.float64))


@each_kind
def test_what_saw_nothing_has_no_range(name: str, symmetric: bool) -> None:
    found = observer(name, symmetric)
    found.update(torch.empty(1, 0))
    with pytest.raises(ModelError, match="no value was observed"):
        found.bounds()
    found.update(torch.ones(1, 1))
    found.update(torch.empty(1, 0))
    assert bounds(found)[1] == [1.0]


@each_kind
@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(2, 4), torch.ones(1, 1, 4), torch.ones(1, 4, dtype=torch.int)])
def test_other_shapes_and_integers_are_refused(name: str, symmetric: bool, x: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="an observer of 1 groups takes floats"):
        observer(name, symmetric).update(x)


@each_kind
def test_nothing_of_the_graph_is_kept(name: str, symmetric: bool) -> None:
    found = observer(name, symmetric)
    found.update(normal(1, 100).requires_grad_())
    assert not any(value.requires_grad for value in vars(found).values() if isinstance(value, torch.Tensor))
    assert not any(end.requires_grad for end in found.bounds())


@each_kind
def test_batches_of_inference_mode_and_of_training_mix(name: str, symmetric: bool) -> None:
    found, plain = observer(name, symmetric), observer(name, symmetric)
    with torch.inference_mode():
        found.update(normal(1, 100) * 9)
    found.update(normal(1, 100, seed=1))
    plain.update(normal(1, 100) * 9)
    plain.update(normal(1, 100, seed=1))
    assert bounds(found) == bounds(plain)
    scale = torch.ones(1, requires_grad=True)
    (scale * found.bounds()[1]).backward()  # a tensor of inference_mode could not be saved for this


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("min_max", {"bits": 1}, "2 to 8 bits"),
        ("min_max", {"bits": 16}, "2 to 8 bits"),
        ("min_max", {"groups": 0}, "at least one group"),
        ("moving_average", {"momentum": 0.0}, r"in \(0, 1\]"),
        ("percentile", {"percentile": 0.0}, "per cent"),
        ("percentile", {"percentile": 101}, "per cent"),
        ("mse", {"bins": 1000}, "power of two"),
        ("mse", {"bins": 128}, "256 or more for 8 bits"),
        ("kl", {"symmetric": False}, "'mse' or 'percentile'"),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OBSERVERS.get(name)(**{"bits": 8, "symmetric": True, **options})  # type: ignore[arg-type]


# Min-max and its mean


def test_min_max_is_that_of_torch() -> None:
    judge, rows = MinMaxObserver(dtype=torch.qint8), PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8)
    ours, grouped = MinMax(bits=8, symmetric=False), MinMax(bits=8, symmetric=False, groups=4)
    for seed in range(5):
        x = normal(4, 64, seed=seed)
        judge(x), rows(x)
        ours.update(x.reshape(1, -1)), grouped.update(x)
    assert bounds(ours) == ([float(judge.min_val)], [float(judge.max_val)])
    assert bounds(grouped) == (rows.min_val.tolist(), rows.max_val.tolist())


@pytest.mark.parametrize("momentum", [0.01, 0.3, 1.0])
def test_the_moving_average_is_that_of_torch(momentum: float) -> None:
    judge = MovingAverageMinMaxObserver(averaging_constant=momentum, dtype=torch.qint8)
    ours = MovingAverage(bits=8, symmetric=False, momentum=momentum)
    symmetric = MovingAverage(bits=8, symmetric=True, momentum=momentum)
    for seed in range(20):
        x = normal(1, 64, seed=seed) + 0.4
        judge(x)
        ours.update(x), symmetric.update(x)
    low, high = float(judge.min_val), float(judge.max_val)
    assert bounds(ours)[0] == pytest.approx([low], rel=1e-6)
    assert bounds(ours)[1] == pytest.approx([high], rel=1e-6)
    assert bounds(symmetric)[1] == pytest.approx([max(-low, high)], rel=1e-6)


# Histograms


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


# Least squared error


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
    if sum(candidate) == 0 or any(a > 0 and b == 0 for a, b in zip(reference, candidate, strict=True)):
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
    # histogram has 2048 bins up to max|x|. Ours has other bins, and its thresholds move with them: the minimum is flat
    # (the tests with the peer compare divergences).
    torch.manual_seed(0)
    x = torch.randn(100_000).abs()
    counts = torch.histc(x, bins=2048, min=0, max=float(x.max())).long()
    assert least_divergence(counts, 2 ** (bits - 1)) * float(x.max()) / 2048 == pytest.approx(threshold, abs=1e-4)


def test_zeros_say_nothing_about_the_threshold() -> None:
    x = normal(1, 50_000)
    dense, sparse = (KLDivergence(bits=8, symmetric=True) for _ in range(2))
    dense.update(x)
    sparse.update(torch.cat([x, torch.zeros(1, 500_000)], dim=1))
    assert bounds(dense) == bounds(sparse)


def test_outliers_are_cut_by_divergence_and_percentile_but_not_by_squared_error() -> None:
    x = with_outliers(100_000)
    high = {}
    for name in NAMES:
        found = observer(name, symmetric=True)
        found.update(x)
        high[name] = bounds(found)[1][0]
    assert high["min_max"] == high["moving_average"] == float(x.abs().max())
    assert high["kl"] < 0.15 * high["min_max"]
    assert high["kl"] < high["percentile"] < 0.7 * high["min_max"]
    assert high["mse"] > 0.5 * high["min_max"]


# Known in advance


@pytest.mark.parametrize(
    ("name", "function", "span"), [("sigmoid", torch.sigmoid, 1.0), ("tanh", torch.tanh, 2.0)], ids=["sigmoid", "tanh"]
)
def test_beyond_the_known_inputs_the_output_changes_by_less_than_a_code(
    name: str, function: Callable[[torch.Tensor], torch.Tensor], span: float
) -> None:
    known = bounds_of(name)
    assert known.input is not None
    low, high = (float(function(torch.tensor(end))) for end in known.input)
    assert low - known.output[0] < span / 255
    assert known.output[1] - high < span / 255
    assert known.input == {"sigmoid": (-6.0, 6.0), "tanh": (-3.0, 3.0)}[name]


def test_known_outputs_and_the_nearest_name() -> None:
    assert bounds_of("softmax") == (None, (0.0, 1.0))
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        bounds_of("sigmod")
