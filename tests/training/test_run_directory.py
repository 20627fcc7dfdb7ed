"""Nothing of an earlier run is lost unless it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.config.compose import load_recipe
from qtrain.errors import CheckpointError
from qtrain.training.run_directory import RunDirectory


@pytest.fixture
def earlier(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    for name in ("checkpoints/step-000002.ckpt", "checkpoints/step-000010.ckpt", "adapter/a", "export/merged/b"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    for name in ("config.yaml", "metrics.csv", "diagnostics.csv", "fit.json", "samples.jsonl", "notes.txt"):
        (run.path / name).touch()
    return run


def files(run: RunDirectory) -> set[str]:
    return {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["run.dir=out/here", "run.name=x"], "out/here"),
        (["run.name=x"], "runs/x"),
        ([], "runs/demo"),
    ],
)
def test_its_place(words: list[str], path: str) -> None:
    assert RunDirectory.of(load_recipe("demo", *words)).path == Path(path)


def test_its_place_without_a_recipe() -> None:
    assert RunDirectory.of(load_recipe(), default_name="fit").path == Path("runs/fit")


def test_a_new_directory_starts_from_nothing(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "new").start(resume=False, overwrite=False) is None
    assert RunDirectory(tmp_path / "new").start(resume=True, overwrite=False) is None


def test_an_earlier_run_is_refused_and_left_as_it_is(earlier: RunDirectory) -> None:
    before = files(earlier)
    with pytest.raises(CheckpointError, match=r"run\.resume=true"):
        earlier.start(resume=False, overwrite=False)
    assert files(earlier) == before


def test_overwriting_keeps_what_is_not_the_runs(earlier: RunDirectory) -> None:
    before = files(earlier)
    assert earlier.start(resume=False, overwrite=True) is None
    assert files(earlier) == before
    earlier.clear()
    assert files(earlier) == {"config.yaml", "notes.txt"}


def test_resume_takes_the_highest_step(earlier: RunDirectory) -> None:
    before = files(earlier)
    assert earlier.start(resume=True, overwrite=False) == earlier.checkpoints / "step-000010.ckpt"
    assert files(earlier) == before


def test_resume_from_a_named_checkpoint(earlier: RunDirectory) -> None:
    chosen = earlier.checkpoints / "step-000002.ckpt"
    assert earlier.start(resume=str(chosen), overwrite=False) == chosen
    with pytest.raises(CheckpointError, match="is no file"):
        earlier.start(resume="nothing.ckpt", overwrite=False)
