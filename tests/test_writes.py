"""Writes leave the old or the new, whatever ends them: a kill at any step, a full disk, a read-only one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtrain.errors import StorageError
from qtrain.files import atomic_directory, atomic_file, write_text
from qtrain.storage import storage_error, told

OLD, NEW = ({name: content for name in ("d/x", "d/y")} for content in ("old", "new"))
SEEN: dict[str, list[object]] = {
    "file": [{"a": "new"}, {"a": "old"}],
    "directory": [NEW, OLD],
    "nested": [NEW, OLD],
    "remove": [OLD, {}],
    "without exchange": [NEW, OLD, {}],  # the moment that a swap in one step does away with
    "shards": ["none", "whole"],
}


def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_writes.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {way: told["seen"] for way, told in found.items()} == {
        way: sorted(json.dumps(state) for state in states) for way, states in SEEN.items()
    }
    assert all(told["kills"] >= 3 for told in found.values()), "each way has its steps"
    assert {json.loads(found[way]["end"])["d/y"] for way in ("directory", "nested")} == {"new"}


def file(path: Path, content: str) -> None:
    write_text(path / "a", content)


def directory(path: Path, content: str) -> None:
    with atomic_directory(path / "d") as whole:
        (whole / "a").write_text(content)


@pytest.mark.parametrize("write", [file, directory])
@pytest.mark.parametrize(
    ("refused", "owner", "step"),
    [
        (errno.ENOSPC, os, "fsync"),
        (errno.EDQUOT, os, "fsync"),
        (errno.EROFS, tempfile, "mkstemp"),
        (errno.EACCES, tempfile, "mkstemp"),
    ],
    ids=["full", "quota", "read-only", "forbidden"],
)
def test_what_a_disk_refuses_is_told_and_the_old_stays(
    write: Callable[[Path, str], None],
    refused: int,
    owner: object,
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, "old")

    def refuse(*given: object, **named: object) -> None:
        raise OSError(refused, os.strerror(refused))

    step = "mkdtemp" if write is directory and step == "mkstemp" else step
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, refuse)
        with pytest.raises(StorageError, match="cannot be written") as caught:
            write(tmp_path, "new")
    assert str(tmp_path) in str(caught.value.where) and caught.value.rule and caught.value.fix
    assert [path.read_text() for path in tmp_path.rglob("a")] == ["old"]
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one can be mounted."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights that are not there")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def text(path: Path) -> None:
    path.write_text("x" * 100_000)


def tensors(path: Path) -> None:
    save_file({"x": torch.zeros(100_000)}, path)


def pickled(path: Path) -> None:
    with path.open("wb") as opened:
        torch.save({"x": torch.zeros(100_000)}, opened)


@pytest.mark.parametrize("write", [text, tensors, pickled])
def test_a_disk_that_is_really_full(write: Callable[[Path], None], small_disk: Path) -> None:
    path = small_disk / "a"
    write_text(path, "old")
    with pytest.raises(StorageError, match="no space is left there"), atomic_file(path) as temporary:
        write(temporary)
    assert path.read_text() == "old" and [entry.name for entry in small_disk.iterdir()] == ["a"]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), told("x"):
        Path("/nowhere/at/all").read_text()
    assert storage_error(ValueError("os error 28")) is None
    nested = RuntimeError("unexpected pos")
    nested.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(storage_error(nested, "x"), StorageError)
