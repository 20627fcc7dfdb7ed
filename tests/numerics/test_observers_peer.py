"""Thresholds beside those of other projects: nvidia-modelopt 0.47.0, brevitas 0.13.4."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from qtrain.numerics.observers.kl import KLDivergence, least_divergence
from qtrain.numerics.observers.percentile import Percentile

pytestmark = pytest.mark.peer

with warnings.catch_warnings():  # of the peers, about what else is installed
    warnings.simplefilter("ignore")
    histogram = pytest.importorskip("modelopt.torch.quantization.calib.histogram", exc_type=ImportError)
    statistics = pytest.importorskip("brevitas.core.stats.stats_op", exc_type=ImportError)


def samples(name: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    if name == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((100_000,))
    elif name == "outliers":
        x[::1000] *= 100
    elif name == "relu":
        x = x.relu()
    return x


def calibrator(x: torch.Tensor, bits: int) -> Any:
    peer = histogram.HistogramCalibrator(num_bits=bits, axis=None, unsigned=False, num_bins=2048)
    peer.collect(x)
    return peer


@pytest.mark.parametrize(
    ("data", "bits"),
    # The peer tries thresholds from bin 128 on whatever the bits, ours from bin 2^(b-1): at 4 bits it cannot reach the
    # bulk of data with outliers at 100 times (bin 17 of 2048).
    [("normal", 8), ("normal", 4), ("laplace", 8), ("laplace", 4), ("relu", 8), ("relu", 4), ("outliers", 8)],
)
def test_the_entropy_threshold_is_modelopts_on_its_histogram(data: str, bits: int) -> None:
    x = samples(data)
    peer = calibrator(x, bits)
    counts, edges = peer._calib_hist.long(), peer._calib_bin_edges
    threshold = float(peer.compute_amax("entropy"))
    assert float(edges[least_divergence(counts, 2 ** (bits - 1))]) == pytest.approx(threshold, abs=1e-6)
    if (data, bits) == ("normal", 8):
        assert threshold == pytest.approx(4.3444, abs=1e-4)


@pytest.mark.parametrize(("data", "tolerance"), [("normal", 0.07), ("laplace", 0.07), ("relu", 0.07)])
def test_the_observers_threshold_is_near_modelopts(data: str, tolerance: float) -> None:
    # Bins of another width: the minimum is flat and its place moves with them, as modelopt's does with num_bins.
    x = samples(data)
    for bits in (4, 8):
        found = KLDivergence(bits=bits, symmetric=True)
        found.update(x[None])
        assert float(found.bounds()[1]) == pytest.approx(
            float(calibrator(x, bits).compute_amax("entropy")), rel=tolerance
        )


@pytest.mark.parametrize("data", ["normal", "laplace", "outliers", "relu"])
def test_percentiles_agree_with_modelopt_within_its_bins(data: str) -> None:
    x = samples(data)
    peer = calibrator(x, 8)
    width = float(peer._calib_bin_edges[1])
    for percentile in (99.0, 99.9):
        found = Percentile(bits=8, symmetric=True, percentile=percentile)
        found.update(x[None])
        # It takes fp32 sums of shares, which lose a few hundredths of a per cent of rank, and the lower edge.
        beside = float(peer.compute_amax("percentile", percentile=percentile))
        assert float(found.bounds()[1]) == pytest.approx(beside, abs=3 * width, rel=0.02)


@pytest.mark.parametrize("data", ["normal", "laplace"])
def test_brevitas_clips_more(data: str) -> None:
    # KLMinimizerThreshold hands the smoothed counts to Categorical(logits=...), which takes them for log
    # probabilities: nearly all weight falls on the fullest bins. Its threshold is recorded, not followed.
    x = samples(data)
    found = KLDivergence(bits=8, symmetric=True)
    found.update(x[None])
    beside = float(statistics.KLMinimizerThreshold(signed=True, bit_width_impl=lambda: torch.tensor(8.0))(x))
    assert 0.3 * float(found.bounds()[1]) < beside < float(found.bounds()[1])
