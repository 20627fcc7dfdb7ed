"""Best-fit-decreasing bin packing: samples into rows of `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample indices; the lengths of a row sum to at most ``capacity``, and no sample is divided.

    The longest sample goes first, each into the fullest row that still holds it (Johnson 1973: at most 11/9 of the
    optimum plus 1). Deterministic; indices ascend within a row and rows by their first index, so that samples that
    fill a row alone keep their order.

    Args:
        lengths: tokens of each sample, none above ``capacity``.
    """
    rows: list[list[int]] = []
    # Rows by the room left in them: room -> row numbers, and the rooms that occur in ascending order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample {index} has {length} tokens, a row holds {capacity}")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return sorted(sorted(row) for row in rows)
