"""Texts decoded together, a column of tokens at a time, without a word between host and device."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.distill.generation.cache import preallocated_cache
from qtrain.modules.growing_keys import growing_keys


@dataclass(frozen=True)
class Texts:
    """Rows that are being written, all on the device of the model.

    Attributes:
        ids: [B, L] int64; the first ``given`` columns are filled, the others get their tokens.
        given: tokens that stand at the beginning of each row.
        greedy: [B] int64; columns before this one take the likeliest token.
        uniforms: [B, L] fp32 in [0, 1), one for each token that is sampled.
    """

    ids: Tensor
    given: int
    greedy: Tensor
    uniforms: Tensor


@torch.no_grad()
def decode(
    model: PreTrainedModel, texts: Texts, *, vocabulary: int, temperature: float, top_k: int
) -> Generator[int, None, Tensor]:
    """Fill ``texts.ids`` column by column, yielding the number of each column when it is under way.

    After a token that ends a text the model goes on, to whatever it takes to come next, and begins no row anew: rows
    are full, and the student is asked about every token that the teacher wrote.

    Args:
        model: causal LM in eval mode; the caller's autocast holds.
        vocabulary: ids lie below it.
        temperature, top_k: as in ``sample``.

    Returns:
        [B] fp32: the entropies, in nats, of the distributions that a row's tokens were sampled from, summed.
    """
    length = texts.ids.shape[1]
    cache = preallocated_cache(model, length)
    entropies = torch.zeros_like(texts.uniforms[:, 0])
    last_greedy = int(texts.greedy.max())
    seen = 0
    for column in range(texts.given, length):
        new = texts.ids[:, seen:column]
        with growing_keys():
            logits: Tensor = model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1, :vocabulary]
        seen = column
        chosen, entropy = sample(logits, texts.uniforms[:, column], temperature=temperature, top_k=top_k)
        if column < last_greedy:
            is_greedy = column < texts.greedy
            chosen = torch.where(is_greedy, logits.argmax(-1), chosen)
            entropy = entropy.masked_fill(is_greedy, 0.0)
        texts.ids[:, column] = chosen
        entropies += entropy
        yield column
    return entropies


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(top-k logits / temperature), by inverting its distribution function.

    One number in [0, 1) decides one token: what is drawn depends neither on the rows beside it nor on the device's own
    generator.

    Args:
        logits: [B, V] of any floating type; the k likeliest are found in it as it is, what follows is fp32.
        uniforms: [B] fp32.
        top_k: 0 is all, which are then not sorted: 49,152 by 4,096 rows would take longer than the model.

    Returns:
        ids [B] int64, and the entropy [B] fp32 of the distribution drawn from, in nats.
    """
    if not top_k or top_k >= logits.shape[-1]:
        p = (logits.float() / temperature).softmax(-1)
        return _places(p, uniforms), torch.special.entr(p).sum(-1)
    likeliest, ids = logits.topk(top_k)
    p = (likeliest.float() / temperature).softmax(-1)
    return ids.gather(1, _places(p, uniforms)[:, None]).squeeze(1), torch.special.entr(p).sum(-1)


def _places(p: Tensor, uniforms: Tensor) -> Tensor:
    """Where the distribution function of ``p`` [B, n] passes ``uniforms`` [B]; p need not be sorted."""
    below = p.cumsum(-1)
    # The sum of 49,152 numbers in fp32 misses 1 by some 1e-6: scaled, no uniform lies beyond it.
    return (below <= (uniforms * below[:, -1])[:, None]).sum(-1).clamp_(max=p.shape[1] - 1)
