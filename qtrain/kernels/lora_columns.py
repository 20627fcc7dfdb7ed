"""x and the low-rank products of adapters side by side, as one product with [W, s B] reads them."""

from __future__ import annotations

from collections.abc import Sequence


class Sides:
    """Where low of each linear lies beside x: one left, one right, and so on outwards, so that most need no gap.

    Args:
        ranks: r of each linear.
        columns: of x.
    """

    def __init__(self, ranks: Sequence[int], columns: int) -> None:
        self._ranks, self._columns = ranks, columns
        start = sum(ranks[0::2])
        self.x = slice(start, start + columns)
        self.width = columns + sum(ranks)
        self.lows: list[slice] = []
        left, right = self.x.start, self.x.stop
        for index, rank in enumerate(ranks):
            if index % 2:
                self.lows.append(slice(right, right + rank))
                right += rank
            else:
                left -= rank
                self.lows.append(slice(left, left + rank))

    def seen(self, index: int) -> slice:
        """Columns of a linear's product: from its low to x, or from x to its low."""
        own = self.lows[index]
        return slice(min(own.start, self.x.start), max(own.stop, self.x.stop))

    def room(self, index: int) -> tuple[int, int]:
        """Columns before and behind W."""
        seen = self.seen(index)
        return self.x.start - seen.start, seen.stop - self.x.stop

    def factor(self, index: int) -> slice:
        """Columns of s B beside W."""
        start = self.seen(index).start
        return slice(self.lows[index].start - start, self.lows[index].stop - start)

    def free(self, index: int) -> list[slice]:
        """Columns between s B and W, which meet the lows of others."""
        own, start = self.lows[index], self.seen(index).start
        gap = slice(self.x.stop, own.start) if index % 2 else slice(own.stop, self.x.start)
        return [slice(gap.start - start, gap.stop - start)] if gap.start < gap.stop else []
