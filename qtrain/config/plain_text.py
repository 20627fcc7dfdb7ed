"""What YAML may hold here: data of bounded size, and references to other keys; no call, no lookup elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf.grammar_parser import parse
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, MappingStartEvent, NodeEvent

from qtrain.errors import ConfigError

DEPTH = 50
NODES = 10_000
CALL = "InterpolationResolverContext"  # of OmegaConf's grammar: ``${name:arguments}``
"""Far above any config. Readers of YAML call themselves once a level, and one alias can stand for all before it."""


def check_size(text: str) -> bool:
    """Refuse YAML that is deep or, with each alias written out, large; told from the parser's events alone.

    Returns:
        Whether it is a mapping, or empty.

    Raises:
        ConfigError: it is.
        yaml.YAMLError: it is no YAML.
    """
    nodes, sizes, mapping = 0, dict[str, int](), True
    begun: list[tuple[str | None, int]] = []  # collections that are open: anchor, nodes before it
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, NodeEvent):
            mapping = mapping and (nodes > 0 or isinstance(event, MappingStartEvent))
            if isinstance(event, CollectionStartEvent):
                begun.append((event.anchor, nodes))
            nodes += sizes.get(str(event.anchor), 1) if isinstance(event, AliasEvent) else 1
        if len(begun) > DEPTH or nodes > NODES:
            found = f"more than {DEPTH} levels" if len(begun) > DEPTH else f"more than {NODES:,} values"
            raise ConfigError(
                found,
                rule=f"a config has at most {DEPTH} levels and {NODES:,} values, those of aliases counted",
                fix="write it without anchors and aliases (&a, *a), or without the nesting",
            )
    return mapping


def check_references(content: Any) -> None:
    """Refuse OmegaConf's resolvers: ``${oc.env:NAME}`` would carry the environment into files that are shared.

    Raises:
        ConfigError: with the first one.
        OmegaConfBaseException: ``${`` that is no reference.
    """
    for text in _texts(content):
        if "${" in text and any(type(node).__name__ == CALL for node in _nodes(parse(text))):
            raise ConfigError(
                f"{text!r} calls a resolver",
                rule="a config is data: ${section.key} refers to another key, and nothing is called or looked up",
                fix="the value itself, or KEY=VALUE on the command line, where the shell replaces $NAME",
            )


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in getattr(tree, "children", None) or ():
        yield from _nodes(child)
