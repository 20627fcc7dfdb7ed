"""The threshold that loses the least information: TensorRT's entropy calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.numerics.observers.histogram import Histogram


class KLDivergence(Histogram):
    """The threshold whose codes tell the histogram of |x| best: the least KL(P || Q), Migacz 2017 (GTC, S7310).

    The threshold is the upper edge of the last bin kept, and never exceeds max|x|.
    """

    def __init__(
        self, *, bits: int, symmetric: bool, groups: int = 1, where: str | None = None, bins: int = 2048
    ) -> None:
        """Nothing seen yet.

        Raises:
            ConfigError: asymmetric; the method is defined on |x|.
        """
        if not symmetric:
            raise ConfigError(
                "symmetric=False with observer 'kl'",
                where=where,
                rule="the entropy calibration chooses one threshold for |x|",
                fix="observer 'mse' or 'percentile', or symmetric=True",
            )
        super().__init__(bits=bits, symmetric=symmetric, groups=groups, where=where, bins=bins)

    def _range(self) -> tuple[Tensor, Tensor]:
        # On the CPU: a few thousand numbers, and CUDA has no deterministic sum over floats so far.
        kept = torch.tensor([least_divergence(counts, 1 << (self.bits - 1)) for counts in self.counts.cpu()])
        high = torch.minimum(kept.to(self.low.device) * self.width(), self.reach())
        return -high, high


def least_divergence(counts: Tensor, levels: int) -> int:
    """How many bins of a histogram of |x| to keep for the least KL(P || Q).

    For each i from ``levels`` to the last bin that is not empty, both of i bins:
    P: the counts of bins 0 .. i-1, those of all further bins added to bin i-1.
    Q: bins 0 .. i-1 without that tail, in ``levels`` runs of neighbours (bin k in run floor(k levels / i)); each run's
    total spread evenly over those of its bins that are not empty. Empty bins stay empty in both.
    Bin 0 counts as bin 1 does: zeros and near-zeros (ReLU) get code 0 under every threshold and say nothing about it.
    A candidate that puts the tail in an empty bin has infinite divergence (P > 0 = Q). One that keeps less than half of
    the numbers is none: where they stay away from zero, as those looked up from a quantized table do, the first bin
    with counts tells itself perfectly. Of equal ones the last wins.

    Args:
        counts: [bins] int64.
        levels: of a magnitude, 2^(b-1).

    Returns:
        i; all bins where there is nothing to choose, for the numbers lie in bin 0 or in fewer bins than levels.
    """
    p = counts.to(torch.float64)
    p[0] = p[1]
    used = p.nonzero()
    if len(used) == 0 or int(used[-1]) < levels:
        return len(counts)
    candidates = torch.arange(levels, int(used[-1]) + 2)
    log_p = torch.where(p > 0, p.log(), 0.0)
    before, entropy_before, used_before = _before(p), _before(p * log_p), _before((p > 0).to(torch.float64))

    run = torch.arange(levels + 1)
    edges = (run * candidates[:, None] + levels - 1) // levels  # first bin of each run: ceil(run i / levels)
    total = before[edges].diff(dim=1)
    log_q = torch.where(total > 0, (total / used_before[edges].diff(dim=1)).log(), 0.0)

    kept, last = before[candidates], p[candidates - 1]
    tail = before[-1] - kept
    # n KL = sum p log p - sum p log q - n log n + n log sum q, over the kept bins, with n the sum of P and p's last
    # bin raised by the tail.
    raised = last + tail
    p_log_p = entropy_before[candidates - 1] + torch.where(raised > 0, raised * raised.log(), 0.0)
    p_log_q = (total * log_q).sum(dim=1) + tail * log_q[:, -1]
    divergence = (p_log_p - p_log_q) / before[-1] - before[-1].log() + kept.log()
    impossible = (kept < before[-1] / 2) | ((last <= 0) & (tail > 0))
    divergence = torch.where(impossible, torch.inf, divergence)
    # Equal up to the rounding of the running sums.
    return int(candidates[divergence <= divergence.min() + 1e-12][-1])


def _before(x: Tensor) -> Tensor:
    """Sum of all entries before each place: [n] to [n + 1]."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))
