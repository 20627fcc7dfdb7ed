"""Hooks of a LightningModule after which something else is done, without its class being touched."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule


class FollowedHooks:
    """Extends methods of one object until ``undo``; what the class defines still runs, first."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def follow(self, pl_module: LightningModule, hook: str, then: Callable[..., None]) -> None:
        """Call ``then`` with the same arguments whenever ``pl_module.<hook>`` has run."""
        original, own = getattr(pl_module, hook), vars(pl_module).get(hook)

        @wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then(*args, **kwargs)
            return result

        def restore() -> None:
            vars(pl_module).pop(hook, None)
            if own is not None:
                vars(pl_module)[hook] = own

        vars(pl_module)[hook] = extended
        self._restore.append(restore)

    def undo(self) -> None:
        """Leave every module as it was."""
        while self._restore:
            self._restore.pop()()
