"""Pydantic's findings as errors that name the key, the value, the rule and the way out."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qtrain.errors import ConfigError
from qtrain.registry import did_you_mean


def problems(section: str, model: type[BaseModel], error: ValidationError) -> list[ConfigError]:
    """One error for each key that is wrong."""
    found: dict[str, ConfigError] = {}
    for detail in error.errors(include_url=False):
        key, owner, words = section, model, [str(word) for word in detail["loc"]]
        field = words[0] if words else ""
        # Sections within sections: the key that is wrong is the innermost one.
        while len(words) > 1 and field in owner.model_fields and (inner := section_of(owner.model_fields[field])):
            key, owner, words = f"{key}.{field}", inner, words[1:]
            field = words[0]
        inside = field in owner.model_fields or detail["type"] == "extra_forbidden"
        key = f"{key}.{field}" if field and inside else key
        found.setdefault(key, _problem(key, field if inside else "", owner, detail))
    return list(found.values())


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a key that is a section of its own, optional or not."""
    for annotation in typing.get_args(info.annotation) or (info.annotation,):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def _problem(key: str, field: str, model: type[BaseModel], detail: ErrorDetails) -> ConfigError:
    if detail["type"] == "extra_forbidden":
        section = key.rpartition(".")[0]
        hint = did_you_mean(field, model.model_fields)
        rule = f"keys of {section}: {', '.join(model.model_fields)}"
        return ConfigError(f"{key} is no key of {section!r}", rule=rule, fix=hint)
    if not field:
        return ConfigError(
            f"{key}: {_own_words(detail)}",
            rule=f"keys of {key} fit together",
            fix=f"change one of them, or leave it out: `qtrain fit --help` has the defaults of {key}.*",
        )
    info, value = model.model_fields[field], detail["input"]
    inner = section_of(info)
    if inner is not None and isinstance(value, BaseModel | dict):
        fix = f"change one of its keys, or leave it out: `qtrain fit --help` has the defaults of {key}.*"
        return ConfigError(f"{key}: {_own_words(detail)}", rule=info.description, fix=fix)
    if inner is not None:
        own = "format" if "format" in inner.model_fields else next(iter(inner.model_fields))
        return ConfigError(f"{key}={value!r} is a section", rule=info.description, fix=f"{key}.{own}={shown(value)}")
    return ConfigError(
        f"{key}={value!r}: {_own_words(detail)}",
        rule=f"{type_name(info.annotation)}{_bounds(info)}: {info.description}",
        fix=None if info.is_required() else f"{key}={shown(info.get_default(call_default_factory=True))} (the default)",
    )


def _own_words(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        return "too few values"
    if detail["type"] in ("float_parsing", "float_type"):
        return "not a number"
    if detail["type"] in ("int_parsing", "int_type", "int_from_float"):
        return "not a whole number"
    return str(detail["msg"])[:1].lower() + str(detail["msg"])[1:]


def type_name(annotation: Any) -> str:
    """A type in a user's words: ``auto|fp32|bf16``, ``number``, ``text or list of text``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"{len(arguments)} {type_name(arguments[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true|false"}.get(annotation, "value")


def shown(value: Any) -> str:
    """A value as one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(item) for item in value) + "]"
    if isinstance(value, BaseModel):
        keys = value.model_dump(exclude_unset=True)
        return "{" + ", ".join(f"{key}: {shown(its)}" for key, its in keys.items()) + "}"
    return "{}" if value == {} else str(value)


def _bounds(info: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    parts = [f"{sign} {getattr(m, name)}" for m in info.metadata for name, sign in signs.items() if hasattr(m, name)]
    return " " + ", ".join(parts) if parts else ""
