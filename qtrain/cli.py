"""`qtrain VERB [recipe=NAME] [section.key=value ...]`"""

from __future__ import annotations

from collections.abc import Sequence

from qtrain import __version__
from qtrain.config.compose import recipe_names
from qtrain.console import err, fail, hush, listing, say
from qtrain.errors import ConfigError, QtrainError
from qtrain.registry import did_you_mean, resolve
from qtrain.stopping import Stopped, stoppable
from qtrain.storage import storage_error
from qtrain.verbs.keys import print_keys
from qtrain.verbs.request import check_inputs, read_request, require_run, splits_of
from qtrain.verbs.table import VERBS
from qtrain.verbs.words import read_words

USAGE = "qtrain VERB [recipe=NAME|PATH] [section.key=value ...]"


def main(words: Sequence[str]) -> int:
    """Run one command; the exit status: 0, 2 for a mistake of the input, 130 for SIGINT, 143 for SIGTERM."""
    hush()
    try:
        with stoppable():
            return _dispatch(list(words))
    except QtrainError as error:
        fail(str(error))
        return 2
    except OSError as error:
        named = storage_error(error)
        if named is None:
            raise
        fail(str(named))
        return 2
    except Stopped as stopped:
        err.print(str(stopped), markup=False)
        return stopped.status
    except KeyboardInterrupt:  # raised where a library has a handler of its own
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
        print_keys(name, rest)
        return 0
    if verb.words:
        resolve(verb.run)(*read_words(name, rest))
        return 0
    if not verb.sections:
        if rest:
            rule = "it reads no config"
            raise ConfigError(f"`qtrain {name}` takes no arguments, not {rest[0]!r}", rule=rule, fix=f"qtrain {name}")
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
    if verb.judges:
        _ = request.exports  # an error where there is none, before anything heavy is imported
    check_inputs(request, splits=splits_of(verb, request))
    resolve(verb.run)(request)
    return 0


def _overview() -> None:
    say(USAGE)
    listing("verbs", [(name, VERBS.get(name).help) for name in VERBS.names()])
    say(", ".join(recipe_names()), title="recipes")
    say("\nqtrain VERB --help lists the keys of a verb.")
