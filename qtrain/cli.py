"""`qtrain VERB [recipe=NAME] [section.key=value ...]`"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic_core import PydanticUndefined

from qtrain import __version__
from qtrain.config.compose import recipe_names
from qtrain.config.problems import shown, type_name
from qtrain.config.schema import TASKS, RunConfig
from qtrain.config.trainer_args import OWNED, trainer_arguments
from qtrain.console import err, fail, hush, listing, say
from qtrain.errors import ConfigError, QtrainError
from qtrain.registry import did_you_mean, resolve
from qtrain.section import Section
from qtrain.verbs.request import check_inputs, read_request, require_run
from qtrain.verbs.table import VERBS

USAGE = "qtrain VERB [recipe=NAME|PATH] [section.key=value ...]"


def main(words: Sequence[str]) -> int:
    """Run one command; the exit status: 0, 2 for a mistake of the input, 130 for an interrupt."""
    hush()
    try:
        return _dispatch(list(words))
    except QtrainError as error:
        fail(str(error))
        return 2
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _overview()
        return 0
    if words[0] == "--version":
        say(f"qtrain {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS.names():
        raise ConfigError(f"{name!r} is no verb", rule=USAGE, fix=did_you_mean(name, VERBS.names()))
    verb = VERBS.get(name)
    if any(word in ("-h", "--help") for word in rest):
        _keys(name, rest)
        return 0
    if not verb.sections:
        if rest:
            raise ConfigError(f"`qtrain {name}` takes no arguments, not {rest[0]!r}", fix=f"qtrain {name}")
        resolve(verb.run)()
        return 0
    request = read_request(name, rest)
    if request.config.task not in verb.tasks:
        raise ConfigError(
            f"`qtrain {name}` does not serve task {request.config.task}",
            rule=f"it serves: {', '.join(verb.tasks)}",
            fix=f"for {request.config.task} there is: "
            + ", ".join(other for other in VERBS.names() if request.config.task in VERBS.get(other).tasks),
        )
    if verb.needs_run:
        require_run(request)
    check_inputs(request, splits=verb.splits)
    resolve(verb.run)(request)
    return 0


def _overview() -> None:
    say(USAGE)
    listing("verbs", [(name, VERBS.get(name).help) for name in VERBS.names()])
    say(", ".join(recipe_names()), title="recipes")
    say("\nqtrain VERB --help lists the keys of a verb.")


def _keys(name: str, words: list[str]) -> None:
    verb = VERBS.get(name)
    say(f"qtrain {name} [recipe=NAME|PATH] [section.key=value ...]\n{verb.help}")
    chosen = [word.partition("=")[2] for word in words if word.startswith("task=")]
    schema: type[RunConfig] = TASKS.get(chosen[-1] if chosen else verb.tasks[0])
    classes: dict[str, list[type[Section]]] = {
        section: [registry.get(entry) for entry in registry.names()] for section, (registry, _) in schema.tagged.items()
    }
    if len(verb.tasks) > 1:
        task = schema.model_fields["task"]
        others = ", ".join(f"task={other} --help" for other in verb.tasks if other != task.default)
        say(
            f"  task  {'|'.join(verb.tasks)} = {task.default}\n        {task.description}; other keys: {others}", "task"
        )
    for section in (name for name in verb.sections if name in schema.model_fields):
        if section == "trainer":
            names = sorted(trainer_arguments().keys() - OWNED.keys())
            say("  " + ", ".join(names), title="trainer.*  (arguments of lightning.Trainer)")
            continue
        annotation = schema.model_fields[section].annotation
        assert isinstance(annotation, type)
        rows: dict[str, tuple[str, str, str]] = {}
        for cls in classes.get(section, [annotation]):
            for key, info in cls.model_fields.items():
                default = info.get_default(call_default_factory=True)
                text = "required" if default is PydanticUndefined else shown(default)
                rows.setdefault(key, (type_name(info.annotation), text, info.description or ""))
        _print_keys(section, rows)


def _print_keys(section: str, rows: dict[str, tuple[str, str, str]]) -> None:
    width = max(len(section) + 1 + len(key) for key in rows)
    say(
        (
            f"  {section + '.' + key:<{width}}  {kind} = {default}\n  {'':<{width}}  {text}"
            for key, (kind, default, text) in rows.items()
        ),
        title=section,
    )
