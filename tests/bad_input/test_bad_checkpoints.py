"""Run directories and checkpoints that cannot be gone on with, and what was trained where it is none."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RESUME = ["fit", "run.dir=run", "run.resume=true", "trainer.max_steps=4"]
VALIDATE = ["validate", "run.dir=run", "data.validation=text.txt"]
TEXT = "the dog sleeps on and the fox jumps over it\n" * 40
ADAPTER = "adapter/adapter_model.safetensors"


class Evil:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*.ckpt"))


def pickled(run: Path) -> None:
    (run / ADAPTER).unlink()
    torch.save(Evil(), run / "adapter" / "adapter_model.bin")


CASES: dict[str, dict[str, Any]] = {
    "a run that is there": dict(
        words=["fit", "run.dir=run"],
        what="an earlier run lies here",
        where="run",
        rule="nothing is overwritten unless it is said",
        fix="run.resume=true goes on with it",
    ),
    "a finished run without checkpoints": dict(
        words=RESUME,
        run=lambda run: shutil.rmtree(run / "checkpoints"),
        what="no checkpoint to go on from, and run/adapter would be trained anew",
        where="run/checkpoints",
        rule="nothing is overwritten unless it is said",
        fix="run.overwrite=true in place of run.resume",
    ),
    "a checkpoint that is no file": dict(
        words=["fit", "run.dir=run", "run.resume=none.ckpt"],
        what="is no file",
        where="run.resume=none.ckpt",
        rule="the path of a checkpoint",
        fix="run.resume=true",
    ),
    "a name that no checkpoint can have": dict(
        words=["fit", "run.dir=run", f"run.resume={'c' * 300}"],
        what="is no file",
        where="run.resume=ccc",
        rule="the path of a checkpoint",
        fix="run.resume=true",
    ),
    "a directory that none can be": dict(
        words=["fit", f"run.dir={'r' * 300}"],
        what="it cannot be a run's directory: File name too long",
        where="rrr",
        rule="there or to be made",
        fix="run.dir=runs/NAME",
    ),
    "a file for a directory": dict(
        words=["fit", "run.dir=text.txt"],
        what="a file lies there",
        where="text.txt",
        rule="run.dir, or runs/ with run.name, is a directory",
        fix="run.dir=runs/NAME",
    ),
    "a config with a tag": dict(
        words=RESUME,
        run=lambda run: (run / "config.yaml").write_text("run: !!python/object/apply:os.mkdir [marker]\n"),
        what="python/object/apply:os.mkdir",
        where="run/config.yaml",
        rule="a recipe is a YAML mapping",
        fix="RUN/config.yaml",
    ),
    "adapters of another rank": dict(
        words=[*RESUME, "method.r=4"],
        loads=True,
        what="is (2, 128) in the checkpoint and (4, 128) here",
        where="step-000002.ckpt",
        rule="what trains must be what was saved",
        fix="the method.* keys of the first run",
    ),
    "other data": dict(
        words=[*RESUME, "data.train=other.txt"],
        loads=True,
        files={"other.txt": TEXT[::-1]},
        what="the data is not what the checkpoint was trained on",
        where="checksum was",
        rule="a position in the data means the same only over the same rows",
        fix="resume with the data.* keys",
    ),
    "nothing trained": dict(
        words=["export", "run.dir=run"],
        run=lambda run: shutil.rmtree(run / "adapter"),
        what="nothing trained lies here",
        where="run",
        rule="a finished `qtrain fit`",
        fix="run.dir=runs/NAME",
    ),
    "an adapter that is a pickle": dict(
        words=VALIDATE,
        run=pickled,
        loads=True,
        what="what was trained cannot be read: No such file",
        where="adapter_model.safetensors",
        rule="pickle runs code",
        fix="run.resume=true writes it again",
    ),
    "an adapter that is cut": dict(
        words=VALIDATE,
        run=lambda run: (run / ADAPTER).write_bytes((run / ADAPTER).read_bytes()[:-9]),
        what="what was trained cannot be read",
        where="adapter_model.safetensors",
        rule="safetensors",
        fix="run.resume=true writes it again",
    ),
    "an adapter of another rank": dict(
        words=[*VALIDATE, "method.r=4"],
        what="the adapter does not fit this model",
        where="run/adapter",
        rule="method.r, method.target_modules",
        fix="leave those keys out",
    ),
    "figures that are none": dict(
        words=["export", "run.dir=run", "export.format=merged"],
        run=lambda run: (run / "fit.json").write_text("[]"),
        what="it cannot be read: it holds []",
        where="run/fit.json",
        rule="one JSON object",
        fix="rm run/fit.json",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_run(
    name: str, refused: Callable[..., str], finished_run: Path, place: Path, tiny_llama_dir: Path
) -> None:
    case = dict(CASES[name])
    change = case.pop("run", lambda run: None)
    files = {"text.txt": TEXT} | case.pop("files", {})

    def copy(here: Path) -> None:
        shutil.copytree(finished_run, here / "run")
        path = here / "run" / "config.yaml"
        path.write_text(path.read_text().replace(str(finished_run), "run"))
        change(here / "run")

    refused(**case, files=files, change=copy)
    assert not (place / "marker").exists()


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"PK\x03\x04", json.dumps({}).encode()])
def test_a_checkpoint_that_is_none(
    content: bytes, finished_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is: an error with a way out, no code of it runs, and the old state stays."""
    from qtrain.callbacks.trainable_checkpoint import read_checkpoint
    from qtrain.errors import CheckpointError

    shutil.copytree(finished_run, place / "run")
    path = newest(place / "run")
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(path))
    assert path.name in str(caught.value) and caught.value.fix
    assert not (place / "marker").exists()
