"""An export that was stopped goes on where it was, and gives the same bytes."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtrain.errors import ExportError
from qtrain.export.partial import partial_export
from qtrain.export.shards import ShardWriter

SCRIPT = Path(__file__).with_name("resume_killed.py")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume_killed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_exports_end_in_the_same_bytes(tmp_path: Path, seed: int) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    killed = script()
    assert told.keys() == killed.CASES.keys()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case, found in told.items():
            whole = []
            killed.export(case, tmp_path / case / "whole", None, lambda whole=whole: whole.append(1))
            assert killed.content(tmp_path / case / "out") == killed.content(tmp_path / case / "whole"), case
            assert found["earlier stayed"], case
            assert found["beside"] == ["out"], case
            assert found["kills"], case
            assert found["computed"][-1] <= len(whole), case
    finally:
        torch.set_num_threads(threads)
    # A kill before the first file was finished leaves nothing to go on with; not all of them can be that.
    assert sum(found["computed"][-1] < 25 for found in told.values()) >= 4


def written(directory: Path, journal: Path, names: list[str], until: int | None = None) -> list[str]:
    """Add tensors of 40 bytes, four to a file, and stop before ``until``; the names that were not held."""
    added = []
    shards = ShardWriter(directory, 160, journal=journal)
    for number, name in enumerate(names[:until]):
        if not shards.holds(name):
            added.append(name)
            shards.add(name, torch.full((10,), float(number)))
    if until is None:
        shards.finish()
    return added


NAMES = [f"t{i}" for i in range(18)]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda folder: None, 8),
        (lambda folder: (folder / "part-1.safetensors").unlink(), 4),
        (lambda folder: os.truncate(folder / "part-1.safetensors", 50), 4),
        (lambda folder: flip(folder / "part-1.safetensors"), 4),
        (lambda folder: flip(folder / "part-0.safetensors"), 0),
        (lambda folder: (folder / "part-0.safetensors").rename(folder / "model-00001-of-00002.safetensors"), 8),
        (lambda folder: (folder / "part-2.safetensors").write_bytes(b"half"), 8),
        (lambda folder: (folder / ".config.json.x.tmp").write_bytes(b"half"), 8),
    ],
    ids=["whole", "gone", "cut", "flipped", "first flipped", "renamed", "half a file", "half a companion"],
)
def test_finished_files_are_checked_before_they_are_trusted(tmp_path: Path, damage: object, kept: int) -> None:
    folder, journal = tmp_path / "files", tmp_path / "journal.json"
    folder.mkdir()
    (tmp_path / "whole").mkdir()
    written(tmp_path / "whole", tmp_path / "other.json", NAMES)
    assert written(folder, journal, NAMES, until=11) == NAMES[:11]
    damage(folder)  # type: ignore[operator]
    assert written(folder, journal, NAMES) == NAMES[kept:]
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_layer_in_two_files_is_whole_only_with_the_second(tmp_path: Path) -> None:
    def parts(number: int) -> dict[str, torch.Tensor]:
        return {f"l{number}.{part}": torch.full((size,), float(number)) for part, size in (("a", 30), ("b", 10))}

    def run(folder: Path, until: int | None = None) -> list[int]:
        folder.mkdir(exist_ok=True)
        added = []
        shards = ShardWriter(folder, 200, journal=tmp_path / f"{folder.name}.json")
        for number in range(5)[:until]:
            if not shards.holds(f"l{number}"):
                added.append(number)
                shards.add_all(f"l{number}", parts(number))
        if until is None:
            shards.finish()
            assert shards.bytes_of(["l0.a"]) == 5 * 160 - 120
        return added

    run(tmp_path / "whole")
    assert run(tmp_path / "out", until=2) == [0, 1]
    # The first file holds all of l0 and nothing of l1; the second would have begun with l1.
    assert run(tmp_path / "out") == [1, 2, 3, 4]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_partial_of_other_options_is_let_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def stopped(key: str) -> None:
        with pytest.raises(KeyboardInterrupt), partial_export(tmp_path / "out", key) as export:
            (export.files / key).write_text(key)
            raise KeyboardInterrupt

    stopped("one")
    assert not (tmp_path / "out").exists()
    with partial_export(tmp_path / "out", "one") as export:
        assert [path.name for path in export.files.iterdir()] == ["one"]
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    stopped("two")
    with partial_export(tmp_path / "out", "three") as export:
        assert not list(export.files.iterdir())
    assert "other options is let go" in caplog.text
    assert not list((tmp_path / "out").iterdir())


def test_an_error_of_the_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError), partial_export(tmp_path / "out", "key"):
        raise ExportError("no such place")
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    kept = tmp_path / ".out.partial"
    kept.mkdir()
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another process"), partial_export(tmp_path / "out", "key"):
            raise AssertionError
