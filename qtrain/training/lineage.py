"""What came from what, in Weights & Biases: base -> adapter, scales or weights -> export, as artifacts."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from qtrain.config.schema import Config, RunConfig, WandbSection
from qtrain.export.verify.files import digests

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
FIGURES = (
    "bytes",
    "bits_per_quantized_weight",
    "quantized_layers",
    "reference_perplexity",
    "candidate_perplexity",
    "kl",
    "top1",
    "merge_loss",
)
"""Of export.json, those that an artifact of an export carries."""
Use = Callable[["wandb.Run"], None]


@rank_zero_only
def use_base(config: RunConfig, loggers: Iterable[Logger], path: str | None, fingerprint: str | None) -> None:
    """Note which base the run began with: the same artifact for each run on the same weights.

    It holds the fingerprint, and the weights themselves if ``wandb.upload`` names ``base``.

    Args:
        path: as the config names it: a hub id, a directory or a file; None where the run began with random weights.
        fingerprint: of the weights there.
    """
    if path is None or fingerprint is None:
        return
    _each(config, loggers, lambda run: _use(run, _base(config.wandb, path, fingerprint)))


@rank_zero_only
def log_trained(
    config: RunConfig, loggers: Iterable[Logger], directory: Path, fingerprint: str | None, figures: Mapping[str, Any]
) -> None:
    """Log what was trained as ``RUN-adapter``, ``-scales`` or ``-weights``, with the figures of fit.json."""
    metadata = {key: value for key, value in figures.items() if isinstance(value, (int, float, str))}
    _each(
        config,
        loggers,
        lambda run: _log(run, _trained(config, directory, name_of(run), fingerprint, metadata)),
    )


@rank_zero_only
def log_export(
    config: Config,
    loggers: Iterable[Logger],
    trained: Path | None,
    run_name: str,
    fingerprint: str | None,
    found: Mapping[str, Any],
) -> None:
    """Log an export as ``RUN-FORMAT``, made from what the run trained, with its figures and the hash of its files.

    Args:
        trained: what was exported, as the run's directory holds it.
        run_name: what the run that trained it is called in W&B.
        found: facts of the export, as export.json holds them.
    """

    def record(run: wandb.Run) -> None:
        if trained is not None:
            _use(run, _trained(config, trained, run_name, fingerprint, {}))
        _log(run, _export(config, run_name, fingerprint, found))

    _each(config, loggers, record)


def name_of(run: wandb.Run) -> str:
    """What a run is called, and so the first part of its artifacts' names."""
    return str(run.name or run.id)


def _each(config: RunConfig, loggers: Iterable[Logger], record: Use) -> None:
    """``record`` in each W&B run there is; what W&B refuses is told, for training must not be lost by it."""
    if not config.wandb.artifacts:
        return
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # here it is installed, or there would be no such logger

            try:
                record(logger.experiment)
            except (wandb.errors.Error, ValueError, OSError) as error:
                log.warning("W&B took no artifact: %s", (str(error) or type(error).__name__).splitlines()[0])


def _use(run: wandb.Run, artifact: wandb.Artifact) -> None:
    if run.offline:
        # The public call refuses offline what it does itself with an artifact that is not logged yet: a record that
        # says "log this if it is new, and I use it", which `wandb sync` sends later.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _log(run: wandb.Run, artifact: wandb.Artifact) -> None:
    run.log_artifact(artifact)


def _base(section: WandbSection, path: str, fingerprint: str) -> wandb.Artifact:
    place = Path(path).expanduser()
    short = "-".join(place.parts[-2:]) if place.is_absolute() else path
    artifact = _artifact(f"base-{short}", {"path": path, "fingerprint": fingerprint})
    # Content decides the version: it is the fingerprint, and no path, which differs between machines.
    with artifact.new_file("base.json") as file:
        json.dump({"fingerprint": fingerprint}, file)
    if "base" in section.upload and place.exists():
        _add(artifact, place)
    return artifact


def _trained(
    config: RunConfig, directory: Path, run_name: str, fingerprint: str | None, figures: Mapping[str, Any]
) -> wandb.Artifact:
    metadata = {"method": config.method.name, "base_fingerprint": fingerprint, **figures}
    artifact = _artifact(f"{run_name}-{directory.name}", metadata)
    _add(artifact, directory, by_reference=directory.name not in config.wandb.upload)
    return artifact


def _export(config: Config, run_name: str, fingerprint: str | None, found: Mapping[str, Any]) -> wandb.Artifact:
    directory = Path(found["directory"])
    files = found.get("sha256") or digests(directory)
    metadata = {
        "format": config.export.format,
        "method": config.method.name,
        "base_fingerprint": fingerprint,
        "codes_sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "sha256": files,
        "verified": found["verified"]["passed"] if "verified" in found else None,
        **{key: found[key] for key in FIGURES if key in found},
    }
    artifact = _artifact(f"{run_name}-{metadata['format']}", metadata)
    _add(artifact, directory, by_reference="export" not in config.wandb.upload)
    return artifact


def _artifact(name: str, metadata: dict[str, Any]) -> wandb.Artifact:
    import wandb  # see _each

    # W&B takes 128 letters, digits, dashes, underscores and dots.
    return wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], type="model", metadata=metadata)


def _add(artifact: wandb.Artifact, place: Path, *, by_reference: bool = False) -> None:
    """The files, or their paths and checksums."""
    if by_reference:
        artifact.add_reference(place.resolve().as_uri())
    elif place.is_dir():
        artifact.add_dir(str(place))
    else:
        artifact.add_file(str(place))
