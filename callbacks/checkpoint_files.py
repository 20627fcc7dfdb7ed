"""Checkpoints as files: written whole or not at all, each with a checksum beside it that a resume compares."""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qtrain.errors import CheckpointError
from qtrain.files import atomic_file, write_json

KEY = "qtrain"
"""Under which a checkpoint holds what is ours."""

_STEP = re.compile(r"step-(\d+)\.ckpt")


class CheckpointFiles(TorchCheckpointIO):
    """Writes straight into the directory, and compares checksums before it reads.

    Lightning's own builds the file in memory and moves it from the directory for temporary files, which is a copy, and
    no single step, where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the file and, beside it, ``FILE.json`` with its size, CRC-32 and validation loss.

        Raises:
            StorageError: no space, or not writable; earlier checkpoints are what they were.
        """
        path = Path(path)
        with atomic_file(path) as temporary:
            with temporary.open("wb") as file:
                summed = _Summed(file)
                torch.save(checkpoint, cast(IO[bytes], summed))
            # An older file of this name goes first: beside the new checksum it would look damaged.
            path.unlink(missing_ok=True)
            loss = checkpoint.get(KEY, {}).get("val_loss")
            write_json(_record(path), {"bytes": summed.bytes, "crc32": f"{summed.crc32:08x}", "val_loss": loss})

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """As Lightning's, of a file that is what was written.

        Raises:
            CheckpointError: it is not.
        """
        check(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


class _Summed:
    """A file that adds up what goes through it.

    CRC-32, since it finds every torn write and every flipped bit and costs least: 4.1 GB/s of zlib's on one core, where
    SHA-256 makes 1.8, BLAKE2b 0.9 and torch.save into a file in memory 1.8 (Xeon with SHA extensions). SHA-256 halved
    the rate of saving.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = self.crc32 = 0

    def write(self, data: bytes) -> int:
        """Write, and count in."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest step first."""
    return sorted((path for path in directory.glob("step-*.ckpt") if _STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint has behind it, from its name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else -1


def best_checkpoint(directory: Path, up_to: float = math.inf) -> tuple[Path, float] | None:
    """The checkpoint of the lowest validation loss, and that loss; None where none was measured.

    Args:
        up_to: the last step that counts.
    """
    losses = {path: _read_record(path).get("val_loss") for path in checkpoints(directory) if step_of(path) <= up_to}
    measured = {path: float(loss) for path, loss in losses.items() if loss is not None}
    return min(measured.items(), key=lambda found: found[1]) if measured else None


def retain(directory: Path, keep: int, step: int, foreign: Collection[Path] = ()) -> None:
    """Let go of all checkpoints but the last ``keep`` up to ``step`` and the best of these.

    Those of later steps are of a run that was cut off and went on from an earlier one.

    Args:
        foreign: checkpoints of somebody else, which stay.
    """
    found = [path for path in checkpoints(directory) if path not in foreign]
    kept = [path for path in found if step_of(path) <= step][-keep:]
    if best := best_checkpoint(directory, up_to=step):
        kept.append(best[0])
    for path in set(found) - set(kept):
        if path.is_dir():  # a file for each process
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        _record(path).unlink(missing_ok=True)


def check(path: Path) -> None:
    """Compare a checkpoint with the checksum beside it; one without (of a directory, of Lightning) passes.

    Raises:
        CheckpointError: it is not what was written; the way out is the newest one before it that is.
    """
    record = _read_record(path)
    if not record or not path.is_file():
        return
    status = path.stat()
    if status.st_size != record["bytes"]:
        raise damaged(path, f"it has {status.st_size:,} bytes, {record['bytes']:,} were written")
    if f"{_crc32(path, status.st_mtime_ns, status.st_size):08x}" != record["crc32"]:
        raise damaged(path, "its CRC-32 is not that of what was written")


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that cannot be gone on from."""
    earlier = next((other for other in reversed(checkpoints(path.parent)) if _precedes(other, path)), None)
    fix = f"run.resume={earlier} goes on from the one before it" if earlier else "run.overwrite=true starts anew"
    return CheckpointError(
        f"this checkpoint is damaged: {reason}",
        where=str(path),
        rule="a run goes on from what was written, to the bit",
        fix=fix,
    )


def _precedes(other: Path, path: Path) -> bool:
    if step_of(other) >= step_of(path):
        return False
    try:
        check(other)
    except CheckpointError:
        return False
    return True


@lru_cache(maxsize=8)
def _crc32(path: Path, changed: int, size: int) -> int:
    """Of a file as it was then: a resume looks at it before the model is loaded and when the weights are."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            total = zlib.crc32(chunk, total)
    return total


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_record(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"bytes": -1, "crc32": ""}  # it is damaged, and so is whatever it stands beside
    return content if isinstance(content, dict) and {"bytes", "crc32"} <= content.keys() else {"bytes": -1, "crc32": ""}
