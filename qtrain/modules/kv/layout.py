"""Keys or values as rows whose numbers share a scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from qtrain.modules.kv.config import KVCacheSection


class Layout(ABC):
    """[B, H, S, D] (H key-value heads) as [B, .., tokens or groups of tokens, .., row], and back.

    Dimension 0 is the batch and dimension 2 counts tokens (groups of them), whatever the layout: that is all a cache
    needs to know to append, cut and reorder.
    """

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """The numbers that share a scale along the last dimension."""

    @abstractmethod
    def heads(self, rows: Tensor, heads: int) -> Tensor:
        """[B, H, S, D] again."""


class OneHead(Layout):
    """A row is one token's numbers of one head: [B, H, S, D] as it is."""

    def rows(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        """The rows themselves."""
        return rows


class AllHeads(Layout):
    """A row is one token's numbers of all heads: [B, 1, S, H D]."""

    def rows(self, x: Tensor) -> Tensor:
        """A view where x is one of a projection's output."""
        return x.transpose(1, 2).flatten(2).unsqueeze(1)

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        """A view."""
        x: Tensor = rows.squeeze(1).unflatten(-1, (heads, -1)).transpose(1, 2)
        return x


@dataclass(frozen=True)
class TokenGroups(Layout):
    """A row is one channel's numbers of ``size`` neighbouring tokens: [B, H, S / size, D, size] (KIVI's keys)."""

    size: int

    def rows(self, x: Tensor) -> Tensor:
        """S must be a multiple of ``size``."""
        grouped: Tensor = x.unflatten(2, (-1, self.size)).transpose(3, 4)
        return grouped

    def heads(self, rows: Tensor, heads: int) -> Tensor:
        """A copy: tokens stand beside each other."""
        return rows.transpose(3, 4).flatten(2, 3)


def layouts(section: KVCacheSection) -> tuple[Layout, Layout]:
    """Of keys and of values."""
    if section.shared == "per_channel":
        assert section.group_size is not None
        return TokenGroups(section.group_size), OneHead()
    layout = AllHeads() if section.shared == "per_token" else OneHead()
    return layout, layout
