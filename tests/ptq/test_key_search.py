"""Scales and turns of key channels: scores stay what they are, and quantized keys cost them less."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.layout import layouts
from qtrain.modules.quantizer import Quantizer
from qtrain.ptq import key_search
from qtrain.ptq.key_search import FURTHEST, TOKENS, KeyFold, Span, search, span_of

LAYOUTS = ("halves", "neighbours")
"""i turns with i + D / 2, or 2i with 2i + 1."""
FOLDS = given(
    layout=st.sampled_from(LAYOUTS),
    pairs=st.integers(1, 8),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
PER_HEAD = span_of(symmetric=False, width=None, together=False)


def pair_of(layout: str, pairs: int) -> Tensor:
    number = torch.arange(pairs)
    return number.repeat(2) if layout == "halves" else number.repeat_interleave(2)


def rotated(x: Tensor, angles: Tensor, layout: str) -> Tensor:
    """RoPE [tokens, H, D] at angles [tokens, D / 2], by complex numbers."""
    first, second = x.chunk(2, dim=-1) if layout == "halves" else (x[..., 0::2], x[..., 1::2])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    parts = (turned.real, turned.imag)
    return torch.cat(parts, dim=-1) if layout == "halves" else torch.stack(parts, dim=-1).flatten(-2)


def unchanged(queries: Tensor, pair: Tensor) -> KeyFold:
    return KeyFold(torch.ones_like(queries), torch.zeros_like(queries), pair)


def objective(change: KeyFold, keys: Tensor, queries: Tensor, span: Span) -> float:
    weight = (change.scale.square() * queries)[:, change.pair]
    return float((span(change.keys(keys)).square() * weight).sum(dim=(1, 2)).mean())


def one_sided_keys(layout: str, *, heads: int = 2, pairs: int = 8, tokens: int = 256, seed: int = 0) -> Tensor:
    """One channel of each pair is large on all tokens, above zero in some pairs and below in others."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, heads, 2 * pairs, generator=generator)
    of_pair = pair_of(layout, pairs).argsort(stable=True).view(-1, 2)
    large = of_pair[torch.arange(pairs), torch.randint(2, (pairs,), generator=generator)]
    keys[..., large] += 10 * (-1.0) ** torch.arange(pairs)
    return keys


def keys_with_outliers(layout: str, tokens: int = 256, seed: int = 0) -> Tensor:
    """Few channels are large on all tokens, other ones in each head."""
    keys = torch.randn(tokens, 2, 16, generator=torch.Generator().manual_seed(seed))
    keys[:, 0, 3] += 12
    keys[:, 1, 6] -= 9
    keys[:, 1, 13] -= 6
    return keys


@FOLDS
def test_scores_stay_what_they_are_at_any_positions(layout, pairs, heads, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    k, q = torch.randn(2, 5, heads, 2 * pairs, dtype=torch.float64, generator=generator)
    at_k, at_q = 100 * torch.rand(2, 5, pairs, dtype=torch.float64, generator=generator)
    own = torch.randn(2, 1 if shared else heads, pairs, dtype=torch.float64, generator=generator)
    change = KeyFold(own[0].exp(), 3 * own[1], pair_of(layout, pairs))

    def scores(k: Tensor, q: Tensor) -> Tensor:
        return torch.einsum("khd,qhd->hqk", rotated(k, at_k, layout), rotated(q, at_q, layout))

    torch.testing.assert_close(scores(change.keys(k), change.queries(q)), scores(k, q), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(change.keys(k), k)


@FOLDS
def test_keys_are_divided_and_queries_multiplied_by_the_same_scale(layout, pairs, heads, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, heads, 2 * pairs, dtype=torch.float64, generator=generator)
    log_scale, turn = torch.randn(2, 1 if shared else heads, pairs, dtype=torch.float64, generator=generator)
    pair = pair_of(layout, pairs)
    change, back = KeyFold(log_scale.exp(), turn, pair), KeyFold((-log_scale).exp(), -turn, pair)
    torch.testing.assert_close(back.keys(change.keys(x)), x)
    torch.testing.assert_close(back.queries(change.queries(x)), x)
    torch.testing.assert_close(change.queries(x), KeyFold(back.scale, turn, pair).keys(x))
    torch.testing.assert_close(change.queries(x), change.keys(x) * change.scale.square()[:, pair])


@pytest.mark.parametrize(
    ("layout", "k", "turned"),
    [
        ("halves", [1.0, -2.0, 0.0, 0.0], [0.0, 2.0, 0.5, 0.0]),
        ("neighbours", [1.0, 0.0, -2.0, 0.0], [0.0, 0.5, 2.0, 0.0]),
    ],
)
def test_a_quarter_turn_takes_the_first_channel_of_a_pair_to_the_second(layout, k, turned):
    # Pair 0 is turned by 90 degrees and divided by 2, pair 1 by 180 degrees alone.
    change = KeyFold(torch.tensor([[2.0, 1.0]]), torch.tensor([[math.pi / 2, math.pi]]), pair_of(layout, 2))
    torch.testing.assert_close(change.keys(torch.tensor([k])), torch.tensor([turned]), rtol=0, atol=1e-6)


def test_double_is_the_same_change_in_float64():
    change = KeyFold(torch.rand(2, 4) + 1, torch.rand(2, 4), pair_of("halves", 4))
    double = change.double()
    assert double.scale.dtype == double.turn.dtype == torch.float64
    torch.testing.assert_close(double.scale, change.scale.double(), rtol=0, atol=0)
    torch.testing.assert_close(double.turn, change.turn.double(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("symmetric", "share"), [(False, 0.35), (True, 0.7)])
def test_turns_narrow_keys_that_are_one_sided_in_all_pairs(layout, together, heads, symmetric, share):
    # Scales cannot: whatever pair they shrink, the others are as wide. The bound of symmetric ranges is 1 / sqrt(2)
    # of the mean; others lose the side below zero too.
    keys, queries = one_sided_keys(layout), torch.ones(heads, 8)
    span = span_of(symmetric, None, together)
    scaled, turned = (search(keys, queries, pair_of(layout, 8), span, turns=turns) for turns in (False, True))
    assert torch.equal(scaled.turn, torch.zeros(heads, 8))
    before, without, error = (
        objective(it, keys, queries, span) for it in (unchanged(queries, scaled.pair), scaled, turned)
    )
    assert without <= 1.001 * before
    assert error < share * without


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_outliers_of_few_channels_are_scaled_away(layout, symmetric, turns):
    keys, queries = keys_with_outliers(layout), torch.ones(2, 8)
    span = span_of(symmetric, None, together=False)
    found = search(keys, queries, pair_of(layout, 8), span, turns=turns)
    assert objective(found, keys, queries, span) < 0.5 * objective(unchanged(queries, found.pair), keys, queries, span)
    # In the queries, where nothing is rounded, the outlier's pair is the largest.
    assert int(found.scale[0].argmax()) == int(found.pair[3])


def test_channels_that_queries_read_most_get_the_finest_steps():
    keys = torch.randn(256, 1, 8, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([[1.0, 100.0, 1.0, 1.0]])
    found = search(keys, queries, pair_of("halves", 4), PER_HEAD, turns=False)
    assert int(found.scale.argmin()) == 1


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_other_scale_or_turn_of_one_pair_does_better(symmetric, turns):
    keys = keys_with_outliers("halves")
    queries = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).exp()
    span = span_of(symmetric, None, together=False)
    found = search(keys, queries, pair_of("halves", 8), span, turns=turns)
    reached = objective(found, keys, queries, span)
    for pair in range(8):
        for step in (-0.2, 0.2):
            moved = torch.zeros(2, 8)
            moved[:, pair] = step
            others = [KeyFold(found.scale * moved.exp(), found.turn, found.pair)]
            others += [KeyFold(found.scale, found.turn + moved, found.pair)] if turns else []
            assert all(objective(other, keys, queries, span) > reached for other in others)
    # Of all common factors, which change nothing, the one that leaves keys about as large as they were.
    assert float(found.scale.log().mean()) == pytest.approx(0, abs=1e-4)


def test_a_turn_that_heads_share_is_that_of_their_mean():
    keys, queries = one_sided_keys("halves"), torch.ones(1, 8)
    keys[:, 0] = 0.1 * torch.randn(256, 16, generator=torch.Generator().manual_seed(1))  # tells of no turn
    found = search(keys, queries, pair_of("halves", 8), PER_HEAD, turns=True)
    assert objective(found, keys, queries, PER_HEAD) < 0.35 * objective(
        unchanged(queries, found.pair), keys, queries, PER_HEAD
    )


@settings(max_examples=25, deadline=None)  # 200 steps of Adam each
@given(
    layout=st.sampled_from(LAYOUTS),
    pairs=st.integers(1, 16),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    tokens=st.integers(1, 100),
    symmetric=st.booleans(),
    together=st.booleans(),
    turns=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_keys_never_become_worse(layout, pairs, heads, shared, tokens, symmetric, together, turns, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, heads, 2 * pairs, generator=generator)
    queries = torch.randn(1 if shared else heads, pairs, generator=generator).exp()
    span = span_of(symmetric, None, together)
    found = search(keys, queries, pair_of(layout, pairs), span, turns=turns)
    assert objective(found, keys, queries, span) <= 1.001 * objective(
        unchanged(queries, found.pair), keys, queries, span
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{}, {"group_size": 8}, {"share": "per_token"}], ids=["head", "group", "all_heads"])
@pytest.mark.parametrize("turns", [False, True])
def test_scores_of_really_quantized_keys_are_nearer(layout, symmetric, options, turns):
    """On other tokens than those of the search."""
    section = KVCacheSection(format="int4", symmetric=symmetric, **options)
    quantizer, rows = Quantizer(section.key_section()), layouts(section)[0]
    span = span_of(symmetric, section.group_size, section.shared == "per_token")
    q = torch.randn(256, 2, 16, generator=torch.Generator().manual_seed(2))
    pair = pair_of(layout, 8)
    queries = q.square().mean(dim=0).new_zeros(2, 8).index_add_(1, pair, q.square().mean(dim=0)) / 2
    found = search(keys_with_outliers(layout, seed=0), queries, pair, span, turns=turns)
    k = keys_with_outliers(layout, seed=1)

    def error(change: KeyFold) -> float:
        seen = change.keys(k).transpose(0, 1).unsqueeze(0)
        stored = rows.heads(quantizer(rows.rows(seen)), 2).squeeze(0).transpose(0, 1)
        lost = torch.einsum("khd,qhd->hqk", stored - change.keys(k), change.queries(q))
        return float(lost.square().mean())

    assert error(found) < 0.75 * error(unchanged(queries, pair))


@given(
    symmetric=st.booleans(),
    groups=st.sampled_from([None, 1, 2, 4]),
    together=st.booleans(),
    heads=st.integers(1, 3),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),  # all below zero, around it, all above it
    seed=st.integers(0, 2**16),
)
def test_spans_are_the_ranges_of_what_shares_a_scale(symmetric, groups, together, heads, shift, seed):
    keys = torch.rand(3, heads, 8, generator=torch.Generator().manual_seed(seed)) * 4 - 2 + shift
    width = 8 // groups if groups and not together else None
    found = span_of(symmetric, width, together)(keys)
    assert found.shape == keys.shape
    for token in range(3):
        for head in range(heads):
            for channel in range(8):
                first = channel // (width or 8) * (width or 8)
                alike = keys[token] if together else keys[token, head, first : first + (width or 8)]
                numbers = [0.0, *alike.flatten().tolist()]
                wide = 2 * max(map(abs, numbers)) if symmetric else max(numbers) - min(numbers)
                assert float(found[token, head, channel]) == pytest.approx(wide, rel=1e-6)


def test_it_searches_where_gradients_are_off():
    keys, queries = one_sided_keys("halves"), torch.ones(2, 8)
    with torch.no_grad():
        found = search(keys, queries, pair_of("halves", 8), PER_HEAD, turns=True)
        assert not torch.is_grad_enabled()
    assert not found.scale.requires_grad and not found.turn.requires_grad
    assert not torch.equal(found.scale, torch.ones(2, 8))


def test_of_many_tokens_some_from_beginning_to_end_are_looked_at():
    seen: list[Tensor] = []

    def span(keys: Tensor) -> Tensor:
        seen.append(keys.detach())
        return PER_HEAD(keys)

    keys = torch.randn(20 * TOKENS + 1, 1, 4, generator=torch.Generator().manual_seed(0))
    keys[-TOKENS:, 0, 1] += 50  # an outlier that only the last ones have
    found = search(keys, torch.ones(1, 2), pair_of("halves", 2), span, turns=True)
    assert {len(it) for it in seen} == {len(keys[::21])} and len(keys[::21]) <= TOKENS
    assert bool(found.scale.isfinite().all() and found.turn.isfinite().all())
    assert int(found.scale.argmax()) == 1


@pytest.mark.parametrize(("numbers", "tokens"), [(64 * 16, 64), (8, 1)])
def test_wide_keys_are_looked_at_on_fewer_tokens(monkeypatch, numbers, tokens):
    monkeypatch.setattr(key_search, "NUMBERS", numbers)
    seen: list[int] = []

    def span(keys: Tensor) -> Tensor:
        seen.append(len(keys))
        return PER_HEAD(keys)

    search(torch.randn(256, 2, 8), torch.ones(2, 4), pair_of("halves", 4), span, turns=False)
    assert set(seen) == {tokens}


def test_pairs_that_no_query_reads_do_not_run_away():
    # Nothing holds their scale back, and each step of it makes the range of the others narrower.
    keys = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0))
    keys[..., [5, 37]] *= 1e6
    queries = torch.ones(1, 32)
    queries[0, 5] = 0
    found = search(keys, queries, pair_of("halves", 32), PER_HEAD, turns=True)
    assert bool(found.turn.isfinite().all())
    assert int(found.scale.argmax()) == 5
    assert float(found.scale.log().abs().max()) == pytest.approx(FURTHEST, rel=1e-5)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("key", "query"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_without_keys_or_queries_but_zeros_no_scale_is_found(key, query, turns):
    keys = key * torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0))
    found = search(keys, query * torch.ones(2, 4), pair_of("halves", 4), PER_HEAD, turns=turns)
    assert torch.equal(found.scale, torch.ones(2, 4))
    assert bool(found.turn.isfinite().all())
