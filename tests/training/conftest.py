"""Weights & Biases offline: a process that never saw it, and what a run left in its own file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record


def _records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes.

    A block has 32 KiB, a chunk in it a header of checksum (4 bytes), length (2) and type (1): 1 is a whole record,
    2, 3 and 4 are the first, middle and last part of one.
    """
    content, offset, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:  # no room for a header: the block is filled with zeros
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


@pytest.fixture
def wandb_records() -> Callable[[Path], list[Record]]:
    """The records of a .wandb file."""
    return lambda path: list(_records(path))


@pytest.fixture
def wandb_artifacts() -> Callable[[Path], list[ArtifactRecord]]:
    """The artifacts in a .wandb file, in the order in which they were logged or used."""

    def read(path: Path) -> list[ArtifactRecord]:
        found = []
        for record in _records(path):
            if record.WhichOneof("record_type") == "artifact":
                found.append(record.artifact)
            elif record.request.WhichOneof("request_type") == "log_artifact":
                found.append(record.request.log_artifact.artifact)
        return found

    return read


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """W&B as on a machine that never saw it: its settings are read once a process, from environment and home."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()
