"""How often a callback looks."""

from __future__ import annotations

from qtrain.errors import ConfigError


def check_period(callback: object, every_n_steps: int) -> None:
    """Raise unless ``every_n_steps`` is a number of steps.

    Raises:
        ConfigError: it is less than one.
    """
    if every_n_steps < 1:
        raise ConfigError(
            f"every_n_steps={every_n_steps}",
            where=type(callback).__name__,
            rule="optimizer steps between two looks: at least 1",
            fix="every_n_steps=10; leave the callback out where nothing is to be measured",
        )
