"""A recipe and `key=value` overrides become one checked Config."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from qtrain.config.plain_text import check_references, check_size
from qtrain.config.problems import problems, shown
from qtrain.config.schema import TASKS, Config, RunConfig
from qtrain.config.trainer_args import OWNED, argument_type, trainer_arguments
from qtrain.errors import ConfigError, ErrorList, QtrainError
from qtrain.files import write_text
from qtrain.paths import unreachable
from qtrain.registry import Registry, did_you_mean
from qtrain.section import Section

RECIPE = "a recipe is a YAML mapping of sections"


def recipe_names() -> list[str]:
    """Names of the recipes that come with qtrain."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files("qtrain.recipes").iterdir() if file.name.endswith(".yaml")
    )


def load_recipe(recipe: str | Path | None = None, *overrides: str) -> Config:
    """Compose a config: defaults, then the recipe, then the overrides.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file (a run's ``config.yaml`` too).
        overrides: ``section.key=value``, the value in YAML: ``data.train=[a.jsonl,b.jsonl]``.

    Returns:
        A config of the class that ``task`` names. It is typed as that of the default task, whose sections people's
        own code reads; a vision recipe gives a VisionConfig.

    Raises:
        ErrorList: every mistake there is, at once.
    """
    chosen = read_recipe(recipe) if recipe is not None else OmegaConf.create()
    given = parse_overrides(overrides)
    where = str(recipe or "overrides")
    try:
        merged = OmegaConf.merge(_put_aside(chosen, given), given)
        check_references(OmegaConf.to_container(merged))
        content = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            str(error).splitlines()[0],
            where=where,
            rule="${section.key} refers to a key that is set",
            fix="the value itself; \\${ is a plain ${",
        ) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=where, rule=error.rule, fix=error.fix) from None
    assert isinstance(content, dict)
    named = {"recipe": str(recipe)} if recipe is not None else {}
    return cast(Config, check(named | {str(key): value for key, value in content.items()}))


def check(content: dict[str, Any]) -> RunConfig:
    """The config of a task from plain nested content; every mistake is collected before any is raised."""
    task = str(content.get("task", "language"))
    if task not in TASKS.names():
        rule = "a task is what kind of model is trained: " + ", ".join(TASKS.names())
        raise ErrorList([ConfigError(f"task={task} is unknown", rule=rule, fix=did_you_mean(task, TASKS.names()))])
    schema = TASKS.get(task)
    errors: list[QtrainError] = []
    known = schema.model_fields
    for key in content.keys() - known.keys():
        rule = "keys belong to sections: " + ", ".join(sorted(known))
        errors.append(ConfigError(f"{key!r} is no section", rule=rule, fix=did_you_mean(key, known)))
    classes: dict[str, type[Section]] = {
        name: info.annotation
        for name, info in known.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }
    for name, (registry, key) in schema.tagged.items():
        try:
            classes[name] = _registered(content.get(name), registry, key)
        except ConfigError as error:
            errors.append(error)
            del classes[name]
    sections: dict[str, Section] = {}
    for name, cls in classes.items():
        values = content.get(name) or {}
        if not isinstance(values, dict):
            rule = "a section is a mapping of keys to values"
            errors.append(ConfigError(f"{name}={values!r} is a section", rule=rule, fix=f"{name}.KEY=VALUE"))
            continue
        try:
            sections[name] = cls.model_validate(values)
        except ValidationError as error:
            errors.extend(problems(name, cls, error))
    trainer = content.get("trainer") or {}
    errors.extend(_trainer_problems(trainer))
    if errors:
        raise ErrorList(errors)
    return schema(task=task, recipe=content.get("recipe"), trainer=trainer, **sections)


def parse_overrides(overrides: tuple[str, ...] | list[str]) -> DictConfig:
    """``key=value`` words as one nested config."""
    given = OmegaConf.create()
    for word in overrides:
        key, sign, value = word.partition("=")
        if not sign or not all(key.split(".")) or key.startswith("["):  # OmegaConf finds no key at all in "[a"
            raise ConfigError(
                f"{word!r} is no override", rule="section.key=value", fix="qtrain fit --help lists the keys"
            )
        try:
            OmegaConf.update(given, key, _value(value), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"{word!r}: {reason}",
                rule="section.key=value, the value in YAML",
                fix=f"quotes for the shell and for YAML where it is text: {key}=\"'TEXT'\"",
            ) from None
        except ConfigError as error:
            raise ConfigError(error.what, where=key, rule=error.rule, fix=error.fix) from None
    return given


def _value(text: str) -> Any:
    check_size(text)
    # OmegaConf's own loader reads 2e-4 as a number, which plain YAML 1.1 takes for text.
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(parsed, dict)
    return parsed["value"]


def read_recipe(recipe: str | Path) -> DictConfig:
    """The content of a recipe, by name or path."""
    name = str(recipe)
    if name in recipe_names():
        path = files("qtrain.recipes") / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")) or "/" in name:
        if unreachable(Path(name)) or not Path(name).is_file():
            raise ConfigError(
                f"recipe={name[:100]} is no file", rule=RECIPE, fix="`qtrain recipes` lists those of qtrain"
            )
        path = Path(name)
    else:
        raise ConfigError(
            f"recipe={name} is unknown",
            rule="a recipe is one of qtrain's by its name, or a .yaml file by its path",
            fix=did_you_mean(name, recipe_names()),
        )
    fix = "`qtrain recipes` lists examples; RUN/config.yaml is one too"
    try:
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.create(text) if check_size(text) else None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split()), where=name, rule=RECIPE, fix=fix) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=name, rule=error.rule, fix=error.fix) from None
    if not isinstance(content, DictConfig):
        raise ConfigError("no mapping", where=name, rule=RECIPE, fix=fix)
    return content


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config, so that ``qtrain fit recipe=PATH`` repeats the run (and never overwrites it)."""
    content = config.model_dump(mode="json")
    content["run"] |= {"resume": False, "overwrite": False}
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _registered(values: Any, registry: Registry[Any], key: str) -> type[Section]:
    name = values.get(key) if isinstance(values, dict) else None
    if name is None:
        name = registry.names()[0]
    if name not in registry.names():
        raise ConfigError(
            f"{registry.kind.split()[0]}.{key}={name} is unknown",
            rule=f"{registry.kind}: {', '.join(registry.names())}",
            fix=did_you_mean(str(name), registry.names()),
        )
    cls: type[Section] = registry.get(name)
    return cls


def _put_aside(recipe: DictConfig, given: DictConfig) -> DictConfig:
    """The recipe less what an override replaces: keys of another method or format, the directory of another run."""
    kept, asked = OmegaConf.to_container(recipe), OmegaConf.to_container(given)
    assert isinstance(kept, dict) and isinstance(asked, dict)
    task = asked.get("task") or kept.get("task") or "language"
    tagged = TASKS.get(task).tagged if task in TASKS.names() else {}  # an unknown one is told when all is checked
    for section, (registry, key) in tagged.items():
        old, new = _value_of(kept, section, key), _value_of(asked, section, key)
        if old and new and old != new and new in registry.names():
            fields = registry.get(new).model_fields
            kept[section] = {name: value for name, value in kept[section].items() if name in fields}
    directory, name = _value_of(kept, "run", "dir"), _value_of(asked, "run", "name")
    if directory and name:
        kept["run"]["dir"] = str(Path(str(directory)).with_name(str(name)))  # beside the run that is repeated
    return OmegaConf.create(kept)


def _value_of(content: dict[Any, Any], section: str, key: str) -> Any:
    values = content.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _trainer_problems(trainer: Any) -> list[ConfigError]:
    if not isinstance(trainer, dict):
        rule = "a section is a mapping of keys to values"
        return [ConfigError(f"trainer={trainer!r} is a section", rule=rule, fix="trainer.max_steps=100")]
    arguments, found = trainer_arguments(), []
    for name, value in trainer.items():
        if name not in arguments:
            hint = did_you_mean(str(name), arguments.keys() - OWNED.keys())
            rule = "trainer.* are the arguments of lightning.Trainer, by their names"
            found.append(ConfigError(f"trainer.{name} is no argument of lightning.Trainer", rule=rule, fix=hint))
        elif name in OWNED:
            rule = "what follows from other sections has one owner"
            found.append(ConfigError(f"trainer.{name} is decided elsewhere", rule=rule, fix=OWNED[name]))
        else:
            try:
                TypeAdapter(argument_type(arguments[name])).validate_python(value)
            except ValidationError:
                rule = f"{name}: {arguments[name]}, an argument of lightning.Trainer"
                fix = f"leave trainer.{name} out for lightning's default"
                found.append(ConfigError(f"trainer.{name}={shown(value)} does not fit", rule=rule, fix=fix))
    return found
