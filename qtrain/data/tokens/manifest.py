"""The manifest of a directory of token shards: whose tokens they are, how they came about, which files hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtrain.errors import DataError
from qtrain.files import write_json

NAME = "manifest.json"
FORMAT = "qtrain tokens"


class Record(BaseModel):
    """Fields as they stand in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Record):
    """One file: ``rows`` x ``length`` ids as a NumPy array.

    Attributes:
        entropy: mean over the sampled tokens of the entropy of the distribution each was drawn from, in nats.
    """

    file: str = Field(pattern=r"^tokens-[0-9]{5,}\.npy$")
    rows: int = Field(ge=1)
    sha256: str
    entropy: float | None = None


class Origin(Record):
    """All that decides what a shard holds; two shards of one number are the same where their origins are.

    Attributes:
        model: fingerprint of the model's files.
        tokenizer_size: entries of its tokenizer.
        length: tokens in a row.
        shard_rows: rows in a whole shard.
        options: of the generation.
    """

    model: str
    tokenizer_size: int
    length: int
    shard_rows: int
    seed: int
    options: dict[str, Any]

    def differences(self, other: Origin) -> list[str]:
        """What is not the same, in words: ``seed is 0, not 1``."""
        mine, others = self.model_dump(), other.model_dump()
        mine, others = mine | mine.pop("options"), others | others.pop("options")
        return [f"{key} is {mine.get(key)}, not {value}" for key, value in others.items() if mine.get(key) != value]


class Manifest(Record):
    """What manifest.json says."""

    format: Literal["qtrain tokens"] = "qtrain tokens"
    version: Literal[1] = 1
    model_path: str
    dtype: Literal["uint16", "uint32"]
    origin: Origin
    complete: bool = False
    statistics: dict[str, float] = Field(default_factory=dict)
    shards: tuple[Shard, ...] = ()


def has_manifest(directory: Path) -> bool:
    """Whether token shards lie there; the manifest of another program is none."""
    path = directory / NAME
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory that has one.

    Raises:
        DataError: it is of another version of qtrain, or was edited.
    """
    path = directory / NAME
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise DataError(
            f"{place}: {detail['msg']}",
            where=str(path),
            rule="a manifest of version 1, as `qtrain generate-data` wrote it",
            fix=f"delete {directory} and call `qtrain generate-data` again",
        ) from None


def read_complete(directory: Path) -> Manifest:
    """The same, of shards that are all there.

    Raises:
        DataError: they are not.
    """
    manifest = read_manifest(directory)
    if not manifest.complete:
        raise DataError(
            "the token shards are not complete",
            where=str(directory),
            rule="a set is trained on whole",
            fix="`qtrain generate-data` as before goes on; a smaller generate_data.tokens takes what is there",
        )
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it, atomically."""
    write_json(directory / NAME, manifest.model_dump())
