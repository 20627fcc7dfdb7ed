"""Which options each layer gets: the general ones, 8 bits for the first and last, and rules by name pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from qtrain.errors import ConfigError, ModelError
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.numerics.spec import BITS
from qtrain.registry import did_you_mean

T = TypeVar("T")
Kind = Literal["linear", "conv2d", "embedding", "pact"]
Options = dict[str, QuantizerSection | None]
Rules = Mapping[str, Mapping[str, Any]]
KEYS: dict[Kind, tuple[str, ...]] = {
    "linear": ("weight", "activation"),
    "conv2d": ("weight", "activation"),
    "embedding": ("embedding",),
    "pact": ("pact",),
}
"""What can be said about a layer of each kind."""
DEFAULTS = {"weight": WeightSection(), "pact": QuantizerSection(symmetric=False, range="pact")}
"""What options begin with, where that is not a QuantizerSection's own."""


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first of ``patterns`` (as in a shell: ``*``, ``?``, ``[ab]``) that is this whole name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_patterns(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raise where a pattern is no layer's.

    Raises:
        ModelError: listing what there is.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            longer = next((name for name in names if name.endswith("." + pattern)), None)
            raise ModelError(
                f"{what} {pattern!r} matches no layer",
                rule=f"patterns match whole names; there is: {_some(names)}",
                fix=f"'*.{pattern}' (which is {longer})" if longer else did_you_mean(pattern, names),
            )


def layer_options(
    kinds: Mapping[str, Kind], general: Options, rules: Rules, ends: Mapping[str, str]
) -> dict[str, Options]:
    """Options of each layer by name; later rules win over earlier ones, and all of them over ``ends``.

    Args:
        kinds: the layers to be quantized, in the order of the model.
        general: ``weight``, ``activation``, ``embedding`` and ``pact``, None where that is left as it is.
        rules: pattern to key to what differs (a dict of options), or None to leave that as it is.
        ends: formats of the first and the last layer, for weight and input.

    Raises:
        ModelError: a rule that has nothing to say about any of these layers.
        ConfigError: a key or an option that does not exist.
    """
    _check_rules(rules, kinds)
    found: dict[str, Options] = {}
    for name, kind in kinds.items():
        options = {key: general[key] for key in KEYS[kind]}
        if name in ends:
            options = _at_an_end(options, ends[name], general["pact"])
        for pattern, changes in rules.items():
            if fnmatchcase(name, pattern):
                for key in KEYS[kind]:
                    if key in changes:
                        where = f"rules[{pattern!r}].{key}"
                        options[key] = section_of(changes[key], key, where, options[key])
        _check_pact(options.get("pact"), name)
        found[name] = options
    return found


def section_of(
    options: QuantizerSection | Mapping[str, Any] | None,
    key: str,
    where: str | None = None,
    before: QuantizerSection | None = None,
) -> QuantizerSection | None:
    """Options as a section.

    Args:
        key: weight, activation, embedding or pact.
        where: they were written, for errors.
        before: what they change.

    Raises:
        ConfigError: a key or a value that does not exist.
    """
    where = where or key
    if options is None or isinstance(options, QuantizerSection):
        return options
    if not isinstance(options, Mapping):
        raise ConfigError(f"{options!r}", where=where, rule="options of a quantizer, or None", fix="{'format': 'int8'}")
    known = before or DEFAULTS.get(key, QuantizerSection())
    return explained(lambda: known.merged(dict(options)), where)


def explained(make: Callable[[], T], where: str) -> T:
    """What ``make`` returns; pydantic's complaints become an error that names the place.

    Raises:
        ConfigError: a key or a value that does not exist.
    """
    try:
        return make()
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_problems(error)),
            where=where,
            rule="options have the names and values of method.* in a recipe",
            fix="`qtrain fit method.name=qat --help` lists them",
        ) from None


def _at_an_end(options: Options, format: str, pact: QuantizerSection | None) -> Options:
    weight, activation = options["weight"], options["activation"]
    if activation is None and pact is not None:
        activation = QuantizerSection(format=format)  # what PACT cannot reach: the image, and the classifier's input
    changes = {"format": format}
    if weight is not None and weight.range == "learned" and BITS.get(format) == 8:
        # An 8-bit step is a 16th of a 4-bit one: at the learning rate of the others it runs away. ResNet-8, SGD 0.1:
        # 1.6 to 5 dB are left of the first layer after 20 steps, 47 dB with its own extremes as the range.
        changes["range"] = "dynamic"
    return {
        "weight": weight and weight.merged(changes),
        "activation": activation and activation.merged({"format": format}),
    }


def _check_pact(section: QuantizerSection | None, name: str) -> None:
    if section is not None and (section.range != "pact" or section.symmetric):
        raise ConfigError(
            f"range={section.range}, symmetric={section.symmetric}",
            where=f"pact of {name}",
            rule="what takes a ReLU's place clips below 0 and above a trained bound: range=pact, symmetric=False",
        )


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key, words = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield f"{key!r} is no key; {did_you_mean(key, QuantizerSection.model_fields)}"
        else:
            yield f"{key}={problem['input']!r}: {words}" if key else words


def _check_rules(rules: Rules, kinds: Mapping[str, Kind]) -> None:
    """Each key of a rule has a layer that it speaks about."""
    every = dict.fromkeys(key for keys in KEYS.values() for key in keys)
    for pattern, changes in rules.items():
        for key in changes:
            where = f"rules[{pattern!r}]"
            if key not in every:
                raise ConfigError(f"{key!r} is no option of a layer", where=where, fix=did_you_mean(key, every))
            able = [name for name, kind in kinds.items() if key in KEYS[kind]]
            if not any(fnmatchcase(name, pattern) for name in able):
                raise ModelError(
                    f"says something about {key} of no layer that is quantized",
                    where=where,
                    rule=f"{key} belongs to: {_some(able) or 'no layer here'}",
                    fix="an output head needs head=True; embedding and pact have keys of their own",
                )


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, and {len(names) - limit} more" if len(names) > limit else shown
