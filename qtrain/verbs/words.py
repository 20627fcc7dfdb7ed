"""Words of a verb that reads no config: bare ones, and keys of its own under its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from qtrain.config.compose import parse_overrides
from qtrain.config.problems import problems
from qtrain.errors import ConfigError, ErrorList
from qtrain.registry import did_you_mean, resolve
from qtrain.section import Section
from qtrain.verbs.table import VERBS


def read_words(verb: str, words: Sequence[str]) -> tuple[list[str], Section]:
    """Bare words in their order, and the checked keys ``verb.KEY=VALUE``.

    Raises:
        ErrorList: another section's keys, unknown keys, values that do not fit.
    """
    cls: type[Section] = resolve(VERBS.get(verb).options)
    keys = [word for word in words if _is_key(word)]
    content: Any = OmegaConf.to_container(parse_overrides(keys))
    for section in content.keys() - {verb}:
        raise ConfigError(
            f"`qtrain {verb}` does not read {section!r}",
            rule=f"it takes {VERBS.get(verb).words}, and keys of {verb}: {', '.join(cls.model_fields)}",
            fix=did_you_mean(section, [verb]),
        )
    try:
        options = cls.model_validate(content.get(verb) or {})
    except ValidationError as error:
        raise ErrorList(problems(verb, cls, error)) from None
    return [word for word in words if not _is_key(word)], options


def _is_key(word: str) -> bool:
    """``section.key=value``; a path may hold a ``=`` behind its first slash."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key
