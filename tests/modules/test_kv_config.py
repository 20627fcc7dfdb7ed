"""Options of a quantized cache: what goes together, and how rows are laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.layout import AllHeads, Layout, OneHead, TokenGroups, layouts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "per_token"}, "granularity is no choice for a cache: say share: per_head"),
        ({"share": "per_tensor"}, "see later ones through the scale: range: static"),
        ({"share": "per_head", "range": "static"}, "share: per_head with range: static.*share: per_tensor"),
        ({"share": "per_channel"}, "group_size: 32"),
        ({"share": "per_token", "group_size": 32}, "group_size with share: per_token"),
        ({"range": "static", "group_size": 32}, "group_size with share: per_tensor"),
        ({"share": "per_channel", "group_size": 32, "site": "pre_rope"}, "site: post_rope"),
        ({"residual": 16, "site": "pre_rope"}, "site: post_rope"),
        ({"format": "ternary"}, "format: ternary is none for a cache"),
        ({"value": {"format": "binary"}}, "format: binary is none for a cache"),
        ({"key": {"format": "int9"}}, "no such format"),
        ({"key": {"range": "static"}}, "range"),
        ({"share": "per_row"}, "per_head"),
    ],
)
def test_contradictions_are_told_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KVCacheSection(**options)


def test_sides() -> None:
    section = KVCacheSection(format="int4", symmetric=False, key={"format": "int8", "symmetric": True})
    key, value = section.key_section(), section.value_section()
    assert (key.format, key.symmetric, key.granularity) == ("int8", True, "per_token")
    assert (value.format, value.symmetric, value.granularity) == ("int4", False, "per_token")
    grouped = KVCacheSection(group_size=8).key_section()
    assert (grouped.granularity, grouped.group_size) == ("per_group", 8)
    static = KVCacheSection(range="static")
    assert static.shared == "per_tensor" and static.value_section().granularity == "per_tensor"
    kivi = KVCacheSection(format="int2", symmetric=False, share="per_channel", group_size=32)
    assert kivi.window == 128 and kivi.key_section().granularity == "per_token"
    of_keys, of_values = layouts(kivi)
    assert of_keys == TokenGroups(32) and isinstance(of_values, OneHead)
    assert KVCacheSection().window == 0 and KVCacheSection().shared == "per_head"


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_rows_and_back(batch: int, heads: int, tokens: int, dim: int, size: int) -> None:
    x = torch.arange(batch * heads * tokens * size * dim).view(batch, heads, tokens * size, dim)
    chosen: tuple[tuple[Layout, int], ...] = ((OneHead(), 1), (AllHeads(), 1), (TokenGroups(size), size))
    for layout, share in chosen:
        rows = layout.rows(x)
        assert rows.shape[0] == batch and rows.shape[2] == tokens * size // share
        assert torch.equal(layout.heads(rows, heads), x)
    assert torch.equal(AllHeads().rows(x)[0, 0, 0], x[0, :, 0].flatten())
    assert torch.equal(TokenGroups(size).rows(x)[0, 0, 0, 0], x[0, 0, :size, 0])
