"""fp32 to bf16 by chance: to a neighbour, unbiased, and nothing finite becomes infinite."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.numerics.stochastic_rounding import counted_bits, round_stochastic

CPU = torch.device("cpu")
BF16 = torch.finfo(torch.bfloat16)
ALL = torch.arange(2**16, dtype=torch.int32)
"""Every noise there is."""


def neighbours(x: float) -> tuple[float, float]:
    """The numbers of bf16 around the fp32 number x, by cutting off and one step further; x must be finite."""
    bits = torch.tensor(x, dtype=torch.float32).view(torch.int32)
    cut = (bits & -65536).view(torch.float32)
    further = ((bits & -65536) + (65536 if bits & 0xFFFF else 0)).view(torch.float32)
    return float(cut), float(further)


def rounded(x: float) -> Tensor:
    return round_stochastic(torch.full((2**16,), x), ALL).double()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_mean_over_all_noise_is_the_number(x: float) -> None:
    found = rounded(x)
    cut, further = neighbours(x)
    if abs(x) > BF16.max:
        assert set(found.tolist()) == {math.copysign(BF16.max, x)}
        return
    if math.isinf(further):
        assert set(found.tolist()) == {cut}
        return
    assert set(found.tolist()) <= {cut, further}
    # A subnormal's mean too: bits are linear in the number between neighbours, at powers of two as well.
    assert float(found.mean()) == x or math.isclose(float(found.mean()), x, rel_tol=1e-12)


def test_specials() -> None:
    tiny = 2.0**-149
    given = torch.tensor([0.0, -0.0, math.inf, -math.inf, BF16.max, torch.finfo(torch.float32).max, -tiny, BF16.tiny])
    for noise in (0, 1, 0xFFFF, -1):
        found = round_stochastic(given, torch.full((len(given),), noise, dtype=torch.int32))
        assert found.dtype == torch.bfloat16
        assert found[:4].tolist() == [0.0, 0.0, math.inf, -math.inf] and torch.signbit(found[1])
        assert found[4:6].tolist() == [BF16.max, BF16.max]
        assert found[6] in (0.0, -(2.0**-133)) and found[7] == BF16.tiny
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 0xFFFF):
        assert round_stochastic(payloads, torch.full((4,), noise, dtype=torch.int32)).isnan().all()


@given(st.floats(2.0**-120, 2.0**120, width=32), st.integers(0, 2**64 - 1))
def test_the_counted_bits_round_without_bias(x: float, seed: int) -> None:
    count = 2**14
    keys = seed >> 32, seed & 0xFFFFFFFF
    one, two = counted_bits(keys, 0, count, CPU)
    cut, further = neighbours(x)
    up = 0.0 if further == cut else (x - cut) / (further - cut)
    for noise in (one, one >> 16, two):
        found = round_stochastic(torch.full((count,), x), noise).double()
        share = 0.0 if further == cut else float((found - cut).mean()) / (further - cut)
        assert abs(share - up) < 6 * math.sqrt(0.25 / count)


def test_bits_are_uniform_and_of_a_number_alone() -> None:
    one, two = counted_bits((7, 2**32 - 1), 0, 2**18, CPU)
    for words in (one & 0xFFFF, (one >> 16) & 0xFFFF, two & 0xFFFF):
        counts = torch.bincount(words.long() >> 8, minlength=256).double()
        chi_square = float(((counts - 1024) ** 2 / 1024).sum())
        assert 160 < chi_square < 370  # 255 degrees of freedom: 255 +- 4.6 * 22.6
        near = torch.corrcoef(torch.stack([words[:-1].double(), words[1:].double()]))[0, 1]
        assert abs(float(near)) < 6 / 2**9
    later, _ = counted_bits((7, 2**32 - 1), 1000, 24, CPU)
    assert torch.equal(later, one[1000:1024])
    other, _ = counted_bits((8, 2**32 - 1), 0, 2**18, CPU)
    together = torch.stack([one & 0xFFFF, two & 0xFFFF, other & 0xFFFF, (one >> 16) & 0xFFFF]).double()
    assert float((torch.corrcoef(together) - torch.eye(4)).abs().max()) < 6 / 2**9
