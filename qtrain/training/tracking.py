"""Where a run's figures go: `metrics.csv` in the run directory and, if asked for, Weights & Biases."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from qtrain.config.schema import RunConfig
from qtrain.files import read_json, write_json
from qtrain.training.lineage import name_of
from qtrain.training.metrics_file import MetricsFile, Row
from qtrain.training.run_directory import SWEEP, RunDirectory

log = logging.getLogger(__name__)
WITHOUT = "W&B is off, figures stay in the run's directory: %s"


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
    if not config.wandb.enabled:
        return [csv]
    started = RunDirectory(run_dir)
    named = None if SWEEP in os.environ else config.run.name  # each run of a sweep has the same
    keys = {
        "name": named or run_dir.name,
        "job_type": "fit",
        "version": _started(started).get("id") if config.run.resume else None,
    }
    wandb = _wandb_logger(config, run_dir, keys)
    if wandb is None:
        return [csv]
    write_json(started.result("wandb"), {"id": wandb.experiment.id, "name": name_of(wandb.experiment)})
    return [csv, wandb]


def export_loggers(config: RunConfig, run: RunDirectory, export_format: str) -> tuple[list[Logger], str]:
    """W&B, if it is enabled and can be reached, in a run of its own beside the one that trained; and that one's name.

    An export may be made days later, elsewhere and again: what it logs is no figure of the training.
    """
    known = _started(run)
    name = known.get("name") or config.run.name or run.path.name
    # An id of its own, or a job that exports WANDB_RUN_ID would write over the run that trained.
    keys = {"name": f"{name}-{export_format}", "group": name, "job_type": "export", "version": secrets.token_hex(4)}
    wandb = _wandb_logger(config, run.path, keys) if config.wandb.enabled else None
    return ([wandb] if wandb else []), name


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
def _wandb_logger(config: RunConfig, run_dir: Path, keys: Mapping[str, Any]) -> WandbLogger | None:
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
            tags=config.wandb.tags,
            save_dir=run_dir,
            config=config.model_dump(mode="json"),
            **keys,
        )
        run = logger.experiment  # starts it: here a failure costs no training
    except wandb.errors.Error as error:
        log.warning(WITHOUT, str(error).splitlines()[0])
        return None
    log.info("W&B: %s", run.settings.sync_dir if run.offline else run.url)
    return logger


def _started(run: RunDirectory) -> dict[str, Any]:
    """Id and name of the W&B run that trained here, if there was one."""
    path = run.result("wandb")
    return read_json(path) if path.is_file() else {}
