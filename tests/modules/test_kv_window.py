"""KIVI's window: which tokens a query sees as codes, against a loop over queries."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.kv.residual import Window, windowed_attention


def asymmetric(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric round to nearest over dimension ``dim``, written down once more."""
    low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def one_query(query: Tensor, key: Tensor, value: Tensor, group: int, residual: int, bits: int, first: int) -> Tensor:
    """Attention of the newest token [H, D] over keys and values [H, n, D], of which it sees those from ``first`` on."""
    n = key.shape[1]
    old = group * (max(0, n - residual) // group)
    groups = [asymmetric(key[:, start : start + group], bits, 1) for start in range(0, old, group)]
    key = torch.cat([*groups, key[:, old:]], dim=1)[:, first:]
    old = max(0, n - residual)
    value = torch.cat([asymmetric(value[:, :old], bits, 2), value[:, old:]], dim=1)[:, first:]
    weights = torch.softmax((key @ query.unsqueeze(-1)).squeeze(-1) * 0.5, dim=-1)
    return (weights.unsqueeze(1) @ value).squeeze(1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_against_a_loop_over_queries(data: Any) -> None:
    draw = data.draw
    tokens, group, residual = draw(st.integers(1, 14)), draw(st.integers(1, 5)), draw(st.integers(0, 8))
    queries = draw(st.integers(1, tokens))
    padding, masks = draw(st.integers(0, tokens - queries)), draw(st.sampled_from(["bool", "float", "none"]))
    padding = 0 if masks == "none" else padding
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query, key, value = (
        torch.randn(1, heads, n, 8, generator=generator) for heads, n in ((4, queries), (2, tokens), (2, tokens))
    )
    section = KVCacheSection(format="int3", symmetric=False, share="per_channel", group_size=group, residual=residual)
    quantizer = KVQuantizer(section)
    window = quantizer.window
    assert window == Window(residual, group)
    coded = quantizer(key[:, :, : window.keys(tokens)], value[:, :, : window.values(tokens)])
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    seen[:, :padding] = False
    mask = {
        "none": None,
        "bool": seen[None, None],
        "float": torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo().min),
    }
    output, weights = windowed_attention(query, key, value, *coded, window, mask[masks], scaling=0.5)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    for at in range(queries):
        n = tokens - queries + at + 1
        for head in range(4):
            pair = slice(head // 2, head // 2 + 1)
            expected = one_query(
                query[0, head : head + 1, at], key[0, pair, :n], value[0, pair, :n], group, residual, 3, padding
            )
            assert torch.allclose(output[0, at, head], expected[0], atol=1e-5)


def test_softcap_and_dropout() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    nothing = key[:, :, :0], value[:, :, :0]
    _, capped = windowed_attention(query * 9, key, value, *nothing, Window(6), None, scaling=1.0, softcap=2.0)
    scores = torch.tanh(query * 9 @ key.transpose(2, 3) / 2) * 2
    expected = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    assert torch.allclose(capped, expected, atol=1e-6)
    torch.manual_seed(0)
    _, dropped = windowed_attention(query, key, value, *nothing, Window(6), None, scaling=1.0, dropout=0.5)
    assert 0.2 < (dropped.tril() == 0).float().mean() < 1 and bool((dropped >= 0).all())
