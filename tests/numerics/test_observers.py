"""Every observer: ranges that do not depend on how the data came, and that are what they say they are."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

from qtrain.errors import ConfigError, ModelError
from qtrain.numerics.observers.histogram import Histogram
from qtrain.numerics.observers.min_max import MinMax
from qtrain.numerics.observers.moving_average import MovingAverage
from qtrain.numerics.observers.observer import Observer
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


# Of normal numbers, and of half as many that are twice as large; 4 bits, symmetric: one row an observer
HIGH = {
    "min_max": 8.202987,
    "moving_average": 4.142509,
    "percentile": 8.202987,
    "mse": 4.367251,
    "kl": 5.230469,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_range_of_numbers_that_everyone_knows(name: str) -> None:
    found, x = observer(name, True, bits=4), normal(1, 4096)
    found.update(x)
    found.update(2 * x[:, :1024])
    assert bounds(found) == ([pytest.approx(-HIGH[name])], [pytest.approx(HIGH[name])])


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
