"""Starts that rewrite a block, its function unchanged, before its layers are quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.block_text import BlockText


class Balancing(ABC):
    """What a start is as well, that rewrites each block before its layers are quantized one by one."""

    @abstractmethod
    def balance(self, block: BlockText, groups: Sequence[Sequence[str]], specs: Mapping[str, QuantSpec]) -> None:
        """Rewrite the block in place.

        Args:
            groups: its layers that share an input, in order of their calls.
            specs: what each of them will become.
        """
