"""Where one number can go from the keys of an attention into its queries, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.ptq.block_text import BlockText
from qtrain.ptq.folds import scale_rows

TOLERANCE = 1e-4
"""Of what the block adds to its input, in fp32, with and without scales of 0.5 to 2."""
SMALLEST = 1e-3
"""Of a head's largest magnitude: what counts for a channel that is nearly silent."""


@dataclass(frozen=True)
class QueryKey:
    """What queries and keys come from: two projections, or the norms after them.

    Attributes:
        query, key: each gives [.., heads x D] or, a norm within heads, [.., D].
        heads: of keys, that have scales of their own; 1 where all share a norm.
        pair: [D], which of D / 2 pairs a channel turns in.
        offset: of norms that multiply by 1 + weight, else 0.
    """

    query: nn.Module
    key: nn.Module
    heads: int
    pair: Tensor
    offset: float = 0.0

    @classmethod
    def of(cls, block: BlockText, attention: nn.Module) -> QueryKey | None:
        """The first that is proven: the block gives what it gave when random scales are folded in."""
        width = int(getattr(attention, "head_dim", 0))
        if width == 0 or width % 2:
            return None
        number = torch.arange(width // 2, device=block.hidden[0].device)
        for query, key in _sources(attention):
            for pair in (number.repeat(2), number.repeat_interleave(2)):  # i with i + D / 2, or 2i with 2i + 1
                for offset in (0.0,) if isinstance(key, nn.Linear) else (0.0, 1.0):
                    rows = len(key.get_parameter("weight"))
                    found = cls(query, key, rows // width, pair.to(key.get_parameter("weight").device), offset)
                    if rows % width == 0 and found._cancels(block):
                        return found
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """What ``fold`` writes to."""
        for module in (self.query, self.key):
            yield from module.parameters(recurse=False)

    def largest(self, block: BlockText) -> tuple[Tensor, Tensor]:
        """Largest magnitudes of queries and of keys on the text [heads, D / 2], of both channels of a pair."""
        found: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            size = output.detach().float().abs().flatten(0, -2).unflatten(-1, (self.heads, -1, len(self.pair)))
            size = size.amax(dim=(0, 2))
            found[module] = torch.maximum(found.get(module, size), size)

        handles = [module.register_forward_hook(note) for module in (self.query, self.key)]
        try:
            for _ in block.outputs():
                pass
        finally:
            for handle in handles:
                handle.remove()
        return self._by_pair(found[self.query]), self._by_pair(found[self.key])

    @staticmethod
    def scale(queries: Tensor, keys: Tensor, powers: tuple[float, float]) -> Tensor:
        """s = keys^a / queries^b [heads, D / 2], its geometric mean 1 in each head."""
        q, k = (size.clamp_min(SMALLEST * float(size.amax()) or 1.0).log() for size in (queries, keys))
        logarithm = powers[0] * k - powers[1] * q
        return (logarithm - logarithm.mean(dim=-1, keepdim=True)).exp()

    def fold(self, scale: Tensor) -> None:
        """Queries times ``scale`` [heads, D / 2], keys divided by it."""
        factor = scale.double()[:, self.pair]
        for module, own in ((self.query, factor), (self.key, 1 / factor)):
            shared = len(module.get_parameter("weight")) // own.numel()  # query heads of one key head
            scale_rows(module, own.repeat_interleave(shared, dim=0).flatten(), self.offset)

    def _by_pair(self, size: Tensor) -> Tensor:
        pairs = size.new_zeros(len(size), len(self.pair) // 2)
        return pairs.scatter_reduce(1, self.pair.expand_as(size), size, "amax")

    def _cancels(self, block: BlockText) -> bool:
        hidden = block.short_hidden.to(self.pair.device)
        before = block.short_call(block.module, hidden)
        kept = [parameter.detach().clone() for parameter in self.parameters()]
        noise = torch.rand(self.heads, len(self.pair) // 2, generator=torch.Generator().manual_seed(0))
        self.fold(torch.exp2(2 * noise - 1).to(hidden.device))
        after = block.short_call(block.module, hidden)
        for parameter, value in zip(self.parameters(), kept, strict=True):
            parameter.copy_(value)
        # Against what the block adds: a residual stream may be a thousand times as large.
        return float((after - before).abs().max()) <= TOLERANCE * float((before - hidden).abs().max())


def _sources(attention: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The norms after the projections, where there are any, take what is folded into the projections back."""
    for names in (("q_norm", "k_norm"), ("q_proj", "k_proj")):
        query, key = (getattr(attention, name, None) for name in names)
        if isinstance(getattr(query, "weight", None), Tensor) and isinstance(getattr(key, "weight", None), Tensor):
            assert isinstance(query, nn.Module) and isinstance(key, nn.Module)
            if len(query.get_parameter("weight")) % len(key.get_parameter("weight")) == 0:
                yield query, key
