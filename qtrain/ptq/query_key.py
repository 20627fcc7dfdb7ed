"""Where scales and turns of key channels can go into an attention's queries, found by trying."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.ptq.block_text import BlockText
from qtrain.ptq.folds import scale_rows
from qtrain.ptq.key_search import KeyFold

TOLERANCE = 1e-4
"""Of what the block adds to its input, in fp32, with and without scales of 0.5 to 2 and turns."""


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

    @property
    def turns(self) -> bool:
        """Whether pairs of channels can be turned too: rows of projections can, weights of norms cannot."""
        return isinstance(self.query, nn.Linear) and isinstance(self.key, nn.Linear)

    def sizes(self, block: BlockText) -> Tensor:
        """E[q^2] on the text [heads, D / 2], over both channels of a pair and all queries of a key head."""
        sums: list[Tensor] = []

        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            square = output.detach().float().square().flatten(0, -2).unflatten(-1, (self.heads, -1, len(self.pair)))
            sums.append(square.mean(dim=(0, 2)))

        handle = self.query.register_forward_hook(note)
        try:
            for _ in block.outputs():
                pass
        finally:
            handle.remove()
        mean = torch.stack(sums).mean(dim=0)
        pairs = mean.new_zeros(self.heads, len(self.pair) // 2)
        return pairs.index_add_(1, self.pair, mean) / 2

    @torch.no_grad()
    def fold(self, change: KeyFold) -> None:
        """Keys become ``change.keys(k)`` and queries ``change.queries(q)``; each number is rounded once."""
        change = change.double()
        if not self.turns:
            for module, own in ((self.query, change.scale), (self.key, 1 / change.scale)):
                factor = own[:, self.pair]
                shared = len(module.get_parameter("weight")) // factor.numel()  # query heads of one key head
                scale_rows(module, factor.repeat_interleave(shared, dim=0).flatten(), self.offset)
            return
        for module, changed in ((self.query, change.queries), (self.key, change.keys)):
            for parameter in module.parameters(recurse=False):
                rows = parameter.to(torch.float64).reshape(self.heads, -1, len(self.pair), parameter[0].numel())
                parameter.copy_(changed(rows.permute(1, 3, 0, 2)).permute(2, 0, 3, 1).reshape(parameter.shape))

    def _cancels(self, block: BlockText) -> bool:
        hidden = block.short_hidden.to(self.pair.device)
        before = block.short_call(block.module, hidden)
        kept = [parameter.detach().clone() for parameter in self.parameters()]
        noise = torch.rand(2, self.heads, len(self.pair) // 2, generator=torch.Generator().manual_seed(0))
        turn = 2 * math.pi * noise[1] if self.turns else torch.zeros_like(noise[1])
        self.fold(KeyFold(torch.exp2(2 * noise[0] - 1).to(hidden.device), turn.to(hidden.device), self.pair))
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
