"""Learning rates by name pattern: ``optimizer.lr_factors``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.registry import did_you_mean


def with_factors(
    groups: Sequence[Mapping[str, Any]], named: Iterable[tuple[str, Tensor]], factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups in which the rate of each parameter is its group's times its factor.

    What no pattern names keeps its rate. With factor 0 a parameter is held, and saved with what trains. Embeddings are
    a case for it: Adam moves a row that hardly occurs by the full rate, whatever the size of its gradient.

    Args:
        groups: each with ``params`` and ``lr``.
        named: of the model, as in ``named_parameters()``.
        factors: shell pattern over the whole name to a factor; the last one that matches counts.

    Raises:
        ConfigError: a pattern that names nothing that trains.
    """
    names = {id(parameter): name for name, parameter in named}
    trained = [names[id(p)] for group in groups for p in group["params"] if id(p) in names]
    for pattern in factors:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise ConfigError(
                f"{pattern!r} matches nothing that trains",
                where="optimizer.lr_factors",
                rule="patterns match whole names of parameters",
                fix=did_you_mean(pattern, trained),
            )
    found: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            factor = next((factors[p] for p in reversed(list(factors)) if fnmatchcase(name, p)), 1.0)
            parts.setdefault(factor, []).append(parameter)
        found += [{**group, "params": part, "lr": group["lr"] * factor} for factor, part in parts.items()]
    return found
