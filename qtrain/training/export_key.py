"""What an interrupted export has to be the same in, to be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qtrain.config.schema import Config
from qtrain.data.sources import locate
from qtrain.models.fingerprint import fingerprint
from qtrain.models.source import find_model
from qtrain.training.run_directory import RunDirectory
from qtrain.version import VERSION

WITHOUT_EFFECT = ("dir", "evaluate", "evaluate_windows", "verify")
"""Keys of ``export.*`` that no written byte depends on."""


def export_key(config: Config, run: RunDirectory) -> str:
    """A hash over what decides the bytes of an export: versions, config, and size and time of each file it comes from.

    Nothing is read of files of weights: on a 7B model a hash of their content would take longer than what it saves.
    """
    section = config.model
    known: dict[str, Any] = {
        "qtrain": VERSION,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "config": config.model_dump(mode="json", include={"model", "method", "data", "distill"}),
        "export": {k: v for k, v in config.export.model_dump(mode="json").items() if k not in WITHOUT_EFFECT},
        "files": [*_states(config, run)],
        "base": fingerprint(find_model(section), section.revision) if section.path else None,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _states(config: Config, run: RunDirectory) -> Iterator[list[Any]]:
    places = [run.config, run.base, *([run.trained] if run.trained else [])]
    if config.model.path and find_model(config.model).kind != "hub":
        places.append(Path(find_model(config.model).location))
    if config.data.train:
        entries = [config.data.train] if isinstance(config.data.train, str) else config.data.train
        places += [found for entry in entries for found in locate(entry) if isinstance(found, Path)]
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file():
                state = file.stat()
                yield [str(file), state.st_size, state.st_mtime_ns]
