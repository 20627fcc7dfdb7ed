"""Rows with room beside them, where others write what is multiplied together with them: no copy into wider rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Room(NamedTuple):
    """Columns to spare before and behind each row."""

    before: int = 0
    after: int = 0


NO_ROOM = Room()


class Spare:
    """What the readers of a layer's output ask of it from the next time on.

    Whoever makes rows by one keeps it as ``spare``, and the room that it made as ``room``, in its autograd node.
    """

    def __init__(self) -> None:
        self.room = NO_ROOM


def roomy(like: Tensor, room: Room) -> Tensor:
    """[rows, columns] as ``like`` has them, to be written, in the middle of wider rows where there is room."""
    rows, columns = like.shape
    return like.new_empty(rows, room.before + columns + room.after)[:, room.before : room.before + columns]


def around(x: Tensor, room: Room) -> Tensor:
    """[rows, before + columns + after], of which x [rows, columns] by ``roomy`` is the middle.

    Autograd takes it for memory of its own: what is written beside x is no change of x.
    """
    width = room.before + x.shape[1] + room.after
    assert _fits(x, room), (x.shape, x.stride(), room)
    return x.new_empty(0).set_(x.untyped_storage(), 0, (len(x), width), (width, 1))


def lent(x: Tensor, rows: Tensor, room: Room) -> Tensor | None:
    """``around`` x's rows where the layer that made x left that room; else None, and it is asked to.

    Args:
        x: as a layer gave it. rows: x [rows, columns], as it is multiplied.
    """
    maker = x.grad_fn
    spare = getattr(maker, "spare", None)
    if not isinstance(spare, Spare) or rows.dtype != x.dtype or rows.data_ptr() != x.data_ptr():
        return None
    left: Room = getattr(maker, "room", NO_ROOM)
    if left != room:
        spare.room = room
        return None
    return around(rows, room) if _fits(rows, room) else None


def _fits(x: Tensor, room: Room) -> bool:
    apart = room.before + x.shape[1] + room.after
    # Of a single row torch may tell another stride.
    return x.stride(1) == 1 and (len(x) == 1 or x.stride(0) == apart) and x.storage_offset() == room.before
