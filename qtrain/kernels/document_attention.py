"""Causal attention of documents that lie one after the other, each of which sees itself alone.

o_i = sum_j softmax_j(scale q_i k_j) v_j over j <= i of the same document. Work goes as the sum of the squares of the
documents' lengths; a mask over all pairs of a row costs the square of the row's (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
"""Entries of a head that torch's flash attention takes, in steps of 8."""


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """o [B, heads, L, D] of q [B, heads, L, D], k, v [B, kv heads, L, D]; gradients reach q, k and v.

    Args:
        ends: int32 [documents + 1], from 0 to B L: where each begins among the tokens of all rows, and the last ends.
        longest: tokens of the longest document.
        scale: of the scores; default: 1 / sqrt(D).
    """
    if why_not_flash(query, key, value) is not None:
        return plain_document_attention(query, key, value, ends, scale)
    flat = [_flat(tensor) for tensor in (query, key, value)]
    packed: Tensor = _varlen()(*flat, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **_grouped(*flat))
    return packed.view(query.shape[0], query.shape[2], *packed.shape[1:]).transpose(1, 2)


def plain_document_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None = None
) -> Tensor:
    """The same, a document after the other by torch's own attention."""
    batch, heads, length, _ = query.shape
    grouped = key.shape[1] != heads
    flat = [_flat(tensor).transpose(0, 1) for tensor in (query, key, value)]
    places = ends.tolist()
    parts = []
    for first, last in zip(places[:-1], places[1:], strict=True):
        q, k, v = (tensor[None, :, first:last] for tensor in flat)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped))
    whole = torch.cat(parts, 2)[0]
    return whole.view(heads, batch, length, -1).transpose(0, 1)


def why_not_flash(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What keeps torch's flash attention from these, in words; None where nothing does."""
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    if len(dtypes) > 1:
        return "queries, keys and values of several dtypes"
    return flash_refuses(query.dtype, (query.shape[-1], value.shape[-1]), query.device)


def flash_refuses(dtype: torch.dtype, widths: tuple[int, int], device: torch.device) -> str | None:
    """The same of heads that are not there yet, ``widths`` of queries and of values."""
    if device.type != "cuda":
        return "no GPU"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} scores"
    width = widths[0]
    if width % 8 or width > LARGEST_HEAD or widths[1] != width:
        return f"heads of {width} and {widths[1]}"
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "a GPU before Ampere"


def _flat(tensor: Tensor) -> Tensor:
    """[B L, heads, D] of [B, heads, L, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


@cache
def _varlen() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _asks_for_groups() -> bool:
    """torch 2.12 wants to be told that key heads are fewer; before it found out."""
    return "enable_gqa" in inspect.signature(_varlen()).parameters


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> dict[str, bool]:
    return {"enable_gqa": True} if query.shape[1] != key.shape[1] and _asks_for_groups() else {}
