"""What changed while a model trains, said when it is first seen and not at every step."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class ToldOnce:
    """Warnings of the blocks of one model: the first layer of each kind and reason is named, the others are not."""

    def __init__(self) -> None:
        self._reasons: set[tuple[str, str]] = set()

    def __call__(self, fact: str, why: object) -> None:
        """Warn that ``fact``, whose first word is a layer's name, for this reason."""
        _, _, kind = fact.partition(" ")
        if (kind, str(why)) not in self._reasons:
            self._reasons.add((kind, str(why)))
            log.warning(f"{fact}: {why} (said once, of the first layer)")
