"""The layout of a run's directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qtrain.config.schema import RunConfig
from qtrain.errors import CheckpointError
from qtrain.files import remove_directory
from qtrain.paths import unreachable

CHECKPOINTS = "checkpoints"
ARTIFACTS = ("adapter", "weights", "scales")
"""Folders that methods leave their trained part in."""
SWEEP, SWEEP_RUN = "WANDB_SWEEP_ID", "WANDB_RUN_ID"
"""What a W&B agent tells the processes that it starts."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run: config, metrics, checkpoints, what was trained, results, report, exports."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig, default_name: str = "run") -> RunDirectory:
        """``run.dir``, else ``runs/NAME`` by ``run.name``, the recipe's name or ``default_name``; of a run that a W&B
        agent starts, ``runs/sweep-SWEEP/NAME-RUN``: all of them have the same name.

        Raises:
            CheckpointError: no directory can lie there.
        """
        recipe = Path(config.recipe).stem if config.recipe else None
        name = config.run.name or recipe or default_name
        sweep, member = os.environ.get(SWEEP), os.environ.get(SWEEP_RUN)
        parts = (f"sweep-{sweep}", f"{name}-{member}") if sweep and member else (name,)
        path = Path(config.run.dir or Path("runs", *parts))
        reason = unreachable(path) or ("a file lies there" if path.is_file() else None)
        if reason:
            raise CheckpointError(
                f"it cannot be a run's directory: {reason}",
                where=str(path)[:100],
                rule="run.dir, or runs/ with run.name, is a directory, there or to be made",
                fix="run.dir=runs/NAME",
            )
        return cls(path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """What training goes on from."""
        return self.path / CHECKPOINTS

    @property
    def base(self) -> Path:
        """The packed base, where the method keeps one."""
        return self.path / "base"

    @property
    def scratch(self) -> Path:
        """From where a long preparation goes on when it was stopped; gone once the base is written."""
        return self.path / "scratch"

    @property
    def trained(self) -> Path | None:
        """What was trained: adapters in PEFT's layout, weights with the ranges of their quantizers, or scales; the
        packed base itself where nothing trains.
        """
        found = [self.path / name for name in ARTIFACTS if (self.path / name).is_dir()]
        if not found and self.result("quantize").is_file() and self.base.is_dir():
            return self.base
        return found[0] if found else None

    @property
    def samples(self) -> Path:
        """Generations during training."""
        return self.path / "samples.jsonl"

    @property
    def teacher_logits(self) -> Path:
        """A teacher's cached logits; they stay when a new run takes the directory over, and serve it if they fit."""
        return self.path / "teacher_logits"

    def result(self, verb: str) -> Path:
        """The figures of a verb."""
        return self.path / f"{verb}.json"

    def export(self, export_format: str) -> Path:
        """An exported checkpoint."""
        return self.path / "export" / export_format

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step."""
        found = sorted(self.checkpoints.glob("step-*.ckpt"), key=lambda path: (len(path.name), path.name))
        return found[-1] if found else None

    def start(self, *, resume: bool | str, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, if there is one; nothing is changed here.

        Raises:
            CheckpointError: an earlier run lies here, and neither resume nor overwrite was asked for.
        """
        if isinstance(resume, str):
            chosen = Path(resume)
            if unreachable(chosen) or not chosen.is_file():
                raise CheckpointError(
                    f"run.resume={resume[:100]} is no file",
                    rule="true, or the path of a checkpoint",
                    fix="run.resume=true takes the newest one",
                )
            return chosen
        if resume:
            newest = self.newest_checkpoint()
            if newest is None and self.trained is not None:
                raise CheckpointError(
                    f"no checkpoint to go on from, and {self.trained} would be trained anew",
                    where=str(self.checkpoints),
                    rule="nothing is overwritten unless it is said",
                    fix="run.overwrite=true in place of run.resume, or run.name=OTHER",
                )
            return newest
        if not overwrite and (self.config.exists() or self.checkpoints.exists()):
            raise CheckpointError(
                "an earlier run lies here",
                where=str(self.path),
                rule="nothing is overwritten unless it is said",
                fix="run.resume=true goes on with it, run.name=OTHER starts beside it, run.overwrite=true replaces it",
            )
        return None

    def kept_base(self) -> Path:
        """The packed base that a checkpoint, or what was trained, belongs to.

        Raises:
            CheckpointError: it is gone; another start would give other codes.
        """
        if not self.base.is_dir():
            raise CheckpointError(
                "the packed base of this run is gone",
                where=str(self.base),
                rule="what was trained belongs to the codes that it began with",
                fix="run.overwrite=true starts anew",
            )
        return self.base

    def clear(self) -> None:
        """Let go of what an earlier run left; files of other programs stay."""
        for entry in (CHECKPOINTS, *ARTIFACTS, "base", "export", "wandb"):
            remove_directory(self.path / entry)
        tables = [self.path / name for name in ("metrics.csv", "diagnostics.csv")]
        for file in [*self.path.glob("*.json"), *self.path.glob("*.jsonl"), *tables]:
            file.unlink(missing_ok=True)
