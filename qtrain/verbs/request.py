"""What the user asked for: a verb, a checked config, and the run it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from qtrain.config.compose import load_recipe, parse_overrides
from qtrain.config.schema import Config, RunConfig, VisionConfig
from qtrain.data.sources import check_sources
from qtrain.errors import CheckpointError, ErrorList, QtrainError
from qtrain.export.locations import ExportLocation, find_exports
from qtrain.models.source import find_model
from qtrain.paths import unreachable
from qtrain.training.run_directory import RunDirectory
from qtrain.verbs.table import VERBS, Verb
from qtrain.vision.files import find_files, find_weights


@dataclass(frozen=True)
class Request:
    """A verb's input.

    Attributes:
        config: the resolved config.
        run: the run's directory; for a verb on a finished run, that run's.
        other_model: ``model.path`` was given beside a run: work on that model, not on the run's.
        paths: of exports of the run, for a verb that judges them; none are all.
    """

    config: Config
    run: RunDirectory
    other_model: bool
    paths: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether the run's trained model is meant."""
        return self.run.trained is not None and not self.other_model

    @property
    def exports(self) -> list[ExportLocation]:
        """The exports at ``paths``.

        Raises:
            ExportError: there is none.
        """
        return find_exports(self.run.path, self.paths)


def read_request(verb: str, words: Sequence[str]) -> Request:
    """Compose the config from ``recipe=``, the config of ``run.dir`` where there is one, and the overrides."""
    recipes = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    judges = VERBS.get(verb).judges
    paths = [word for word in words if judges and word.startswith("model.path=")]
    overrides = [word for word in words if not word.startswith("recipe=") and word not in paths]
    given = parse_overrides(overrides)
    run_section = given.get("run")
    recipe: str | Path | None = recipes[-1] if recipes else None
    directory = run_section.get("dir") if isinstance(run_section, DictConfig) else None
    if recipe is None and isinstance(directory, str) and not unreachable(beside := Path(directory) / "config.yaml"):
        recipe = beside if beside.is_file() else None
    config = load_recipe(recipe, *overrides)
    model = given.get("model")
    other_model = recipe is not None and isinstance(model, DictConfig) and "path" in model
    return Request(config, RunDirectory.of(config, default_name=verb), other_model, _paths(paths))


def _paths(words: Sequence[str]) -> tuple[str, ...]:
    """``model.path=DIR`` or ``model.path=[DIR,DIR]`` as paths."""
    if not words:
        return ()
    value = parse_overrides(list(words)).model.path
    return (value,) if isinstance(value, str) else tuple(map(str, value or ()))


def splits_of(verb: Verb, request: Request) -> tuple[str, ...]:
    """The splits of ``data.*`` that must be there."""
    if not verb.optional:
        return verb.splits
    config = request.config
    needed = {"train"} if config.method.looks_at_text else set()
    return tuple(split for split in verb.splits if split in needed or getattr(config.data, split) is not None)


def check_inputs(request: Request, *, splits: Sequence[str]) -> None:
    """Look at the model and the data from afar, before anything heavy is imported.

    Raises:
        ErrorList: what is not there, all of it.
    """
    config: RunConfig = request.config
    if isinstance(config, VisionConfig):
        find_files(config.data.path)
        if config.model.weights:
            find_weights(config.model.weights)
    else:
        _check_language_inputs(request.config, splits)


def _check_language_inputs(config: Config, splits: Sequence[str]) -> None:
    errors: list[QtrainError] = []
    try:
        find_model(config.model)
    except QtrainError as error:
        errors.append(error)
    if "train" in splits or not config.method.trains:
        try:
            config.export.check_trained(config.method.trained_layers())
            config.export.check_cache(config.method.trained_cache)
            if base := getattr(config.method, "base", None):
                config.export.check_base(base)
        except QtrainError as error:
            errors.append(error)
    data = config.data
    kept = {name: None for name in ("train", "validation", "test", "predict") if name not in splits}
    errors.extend(check_sources(data.model_copy(update=kept)))
    for split in splits:
        if getattr(data, split) is None and not (split == "validation" and "train" in splits):
            errors.append(
                QtrainError(
                    f"data.{split} is not set",
                    rule="text, chats or token shards to work on",
                    fix=f"data.{split}=FILE, a directory or a hub id",
                )
            )
    try:
        config.distill.check_streaming("train" in splits and data.streaming)
    except QtrainError as error:
        errors.append(error)
    if errors:
        raise ErrorList(errors)


def require_run(request: Request) -> None:
    """For verbs on a finished run.

    Raises:
        CheckpointError: ``run.dir`` holds nothing trained.
    """
    if request.run.trained is None:
        raise CheckpointError(
            "nothing trained lies here",
            where=str(request.run.path),
            rule="run.dir is the directory of a finished `qtrain fit`",
            fix="run.dir=runs/NAME",
        )
