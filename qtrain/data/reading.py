"""From files and hub ids to records that know where they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.iterable_dataset import IterableDataset
from datasets.load import load_dataset

from qtrain.data.sources import TEXT_SUFFIXES, HubSet
from qtrain.errors import DataError

# Of a stream of plain text; a piece ends at the next end of line. 1 MiB is about 250,000 tokens.
PIECE = 1 << 20
JSON = "an array of objects, or one object a line"
MEND = "correct that sample, or take it out of the file"


@dataclass(frozen=True)
class Record:
    """One sample as it stands in its source; ``fields`` of plain text are ``{"text": ..., "ends": False}``."""

    fields: Mapping[str, Any]
    source: str
    number: int
    line: int | None = None

    @property
    def where(self) -> str:
        """``train.jsonl:12 (sample 12)``."""
        return (
            f"{self.source}:{self.line} (sample {self.number})"
            if self.line
            else f"{self.source} (sample {self.number})"
        )


def read(location: Path | HubSet, *, split: str, whole: bool = True, start: int = 0) -> Iterator[Record]:
    """The records of one file or hub id, from the one with index ``start`` on.

    Args:
        split: which split a hub id without one means.
        whole: plain text is one record, and a hub id is fetched into the cache of ``datasets``. Otherwise text comes in
            pieces of about a mebibyte that end at a line's end, and a hub id is streamed.

    Errors: DataError with file, line and sample for JSON that does not parse; for sources that cannot be opened.
    """
    if isinstance(location, HubSet):
        records = _read_hub(location, split, start, streaming=not whole)
        start = 0
    elif location.suffix.lower() in TEXT_SUFFIXES:
        records = _read_text(location, whole)
    elif location.suffix.lower() in (".json", ".jsonl"):
        records = _read_json(location)
    else:
        records = _read_table(location, start)
        start = 0
    return islice(_readable(records, str(location)), start, None)


def _readable(records: Iterator[Record], source: str) -> Iterator[Record]:
    """The records; a file that was there when the run began, and is not any more, is told as such."""
    try:
        yield from records
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}",
            where=source,
            rule="a stream reads its files all the time that it trains",
            fix="put the file back; run.resume=true goes on from the newest checkpoint",
        ) from error


def _read_text(path: Path, whole: bool) -> Iterator[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            number = 0
            while text := file.read() if whole else file.read(PIECE) + file.readline():
                number += 1
                yield Record({"text": text, "ends": False}, str(path), number)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _read_json(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _read_array(path, file.read())
                return
            number = 0
            for line, text in enumerate(file, start=1):
                if text.strip():
                    number += 1
                    yield _record(path, number, line, text)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _record(path: Path, number: int, line: int, text: str) -> Record:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"this line is no JSON: {_reason(error)}", where=f"{path}:{line} (sample {number})", rule=JSON, fix=MEND
        ) from None
    return Record(_fields(value, path, number, line), str(path), number, line)


_GAP = re.compile(r"[\s,]*")


def _read_array(path: Path, text: str) -> Iterator[Record]:
    """Objects of a JSON array one by one, since ``json.load`` does not say on which line an object begins."""
    decoder = json.JSONDecoder()
    at, line, number = text.index("[") + 1, 1, 0
    counted = 0
    while True:
        gap = _GAP.match(text, at)
        at = gap.end() if gap else at
        line += text.count("\n", counted, at)
        counted = at
        if text.startswith("]", at):
            return
        number += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            place = getattr(error, "lineno", line)
            raise DataError(
                f"no JSON: {_reason(error)}", where=f"{path}:{place} (sample {number})", rule=JSON, fix=MEND
            ) from None
        yield Record(_fields(value, path, number, line), str(path), number, line)


def _fields(value: object, path: Path, number: int, line: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"a sample is an object, here is {json.dumps(value)[:60]}",
            where=f"{path}:{line} (sample {number})",
            rule=JSON,
            fix=MEND,
        )
    return value


def _reason(error: Exception) -> str:
    """Of the parser: also for numbers of thousands of digits, and for arrays in arrays that its stack cannot hold."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "values lie too deep in one another" if isinstance(error, RecursionError) else str(error)


def _read_table(path: Path, start: int) -> Iterator[Record]:
    """Parquet and CSV."""
    kind = path.suffix.lower().removeprefix(".")
    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows.skip(start) if start else rows, start=start + 1):
            yield Record(row, str(path), number)
    except DataError:
        raise
    except Exception as error:  # pyarrow and pandas raise anything from OSError to NotImplementedError on damaged bytes
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise DataError(
            f"not a readable {kind} file: {reason}",
            where=str(path),
            rule="a table with a row for each sample, whole",
            fix=f"write it again: datasets.Dataset.from_list(samples).to_{kind}({path.name!r})",
        ) from None


def _read_hub(hub: HubSet, split: str, start: int, *, streaming: bool) -> Iterator[Record]:
    wanted = hub.split or ("test" if split == "predict" else split)
    try:
        if streaming:  # load_dataset is typed by the literal value.
            rows: Dataset | IterableDataset = load_dataset(hub.name, hub.config, split=wanted, streaming=True)
        else:
            rows = load_dataset(hub.name, hub.config, split=wanted, streaming=False)
        for number, row in enumerate(rows.skip(start) if start else rows, start=start + 1):
            yield Record(row, f"{hub.name}[{wanted}]", number)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"the hub id cannot be read: {str(error).strip().splitlines()[0]}",
            where=str(hub),
            rule="name, name:split or name[config]:split of a data set of the hub, or a file that exists",
            fix=f"check the name and the split ({wanted}), and that the hub can be reached",
        ) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    rule, fix = "text is read as UTF-8", "save the file as UTF-8"
    return DataError(f"byte {error.start} is not UTF-8", where=str(path), rule=rule, fix=fix)
