"""Where a run's figures go: `metrics.csv` in the run directory and, if asked for, Weights & Biases."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from qtrain.config.schema import RunConfig
from qtrain.training.metrics_file import MetricsFile, Row

log = logging.getLogger(__name__)
WITHOUT = "W&B is off, figures go to metrics.csv alone: %s"


def loggers(
    config: RunConfig, run_dir: Path, resume_step: int | None = None, last_row: Row | None = None
) -> list[Logger]:
    """`metrics.csv`, exactly there in ``run_dir``, and W&B if it is enabled and can be reached.

    Args:
        config: resolved; W&B shows the whole of it.
        run_dir: the run's directory.
        resume_step: optimizer steps done by the checkpoint that ``run.resume`` goes on from; rows of
            `metrics.csv` from there on are written again. None finds it from the first row that is logged.
        last_row: figures of that checkpoint's step, should they not be in `metrics.csv` yet.
    """
    keep_below = resume_step if config.run.resume else 0
    csv: Logger = MetricsFile(run_dir / "metrics.csv", keep_below=keep_below, last_row=last_row)
    wandb = _wandb_logger(config, run_dir) if config.wandb.enabled else None
    return [csv, wandb] if wandb else [csv]


@rank_zero_only
def log_artifacts(config: RunConfig, loggers: Iterable[Logger], directories: Mapping[str, Path]) -> None:
    """Upload each directory to W&B as an artifact ``RUN-NAME`` of type model; without W&B there is nothing to do.

    Args:
        config: ``wandb.artifacts`` switches it off.
        loggers: those of the run.
        directories: what it is (``adapter``, ``weights``, ``export``) and where it lies.
    """
    if not config.wandb.artifacts:
        return
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # here it is installed, or there would be no such logger

            for name, directory in directories.items():
                # W&B takes letters, digits, dashes, underscores and dots.
                run = re.sub(r"[^\w.-]", "-", logger.experiment.name or logger.experiment.id, flags=re.ASCII)
                artifact = wandb.Artifact(f"{run}-{name}", type="model")
                artifact.add_dir(str(directory))
                logger.experiment.log_artifact(artifact)


@rank_zero_only
def log_recovery(loggers: Iterable[Logger], recovery: Mapping[str, float | None] | None, step: int) -> None:
    """Log the figures of the table that a quantization-aware run ends with, as ``recovery/*``."""
    figures = {f"recovery/{key}": value for key, value in (recovery or {}).items() if value is not None}
    for logger in loggers:
        if figures:
            logger.log_metrics(figures, step=step)


@rank_zero_only
def close(loggers: Iterable[Logger]) -> None:
    """Write what is held back and end the W&B run: left open, it would take in the figures of the next one."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


@rank_zero_only
def _wandb_logger(config: RunConfig, run_dir: Path) -> WandbLogger | None:
    try:
        import wandb  # it takes 1 s, and a run without it is a run
    except ImportError:
        log.warning(WITHOUT, "the package is not installed (pip install wandb)")
        return None
    try:
        # wandb.init would ask for a missing key, and a job at night has nobody to answer.
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            log.warning(WITHOUT, "no API key (wandb login, or WANDB_MODE=offline)")
            return None
        run_dir.mkdir(parents=True, exist_ok=True)  # W&B turns to /tmp where it is missing
        logger = WandbLogger(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.run.name or run_dir.name,
            version=_newest_id(run_dir) if config.run.resume else None,
            tags=config.wandb.tags,
            save_dir=run_dir,
            config=config.model_dump(mode="json"),
        )
        run = logger.experiment  # starts it: here a failure costs no training
    except wandb.errors.Error as error:
        log.warning(WITHOUT, str(error).splitlines()[0])
        return None
    log.info("W&B: %s", run.settings.sync_dir if run.offline else run.url)
    return logger


def _newest_id(run_dir: Path) -> str | None:
    """Id of the W&B run that was started last in this directory: W&B names its folder ``…run-DATE-ID``."""
    latest = run_dir / "wandb" / "latest-run"
    return latest.resolve().name.rsplit("-", 1)[-1] if latest.exists() else None
