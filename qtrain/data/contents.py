"""Records read in their format: explicit, or recognised by the first record of each source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qtrain.data.config import DataSection
from qtrain.data.formats.record import Content, Document, Fields
from qtrain.data.formats.registry import FORMATS, Format
from qtrain.data.reading import MEND, Record, read
from qtrain.data.sources import TEXT_SUFFIXES, Location, TokenDirectory
from qtrain.errors import DataError


@dataclass(frozen=True)
class Item:
    """A sample's content and where it came from."""

    content: Content
    where: str


def read_contents(
    location: Location, section: DataSection, *, split: str, whole: bool = True, start: int = 0
) -> Iterator[Item]:
    """The contents of one source, from the record with index ``start`` on.

    Errors: DataError naming file, line and sample for keys that are missing or of a wrong type, and for a record that
    is not in the format of those before it; for token shards, which hold no text.
    """
    if isinstance(location, TokenDirectory):
        raise DataError(
            "token shards hold no text",
            where=str(location),
            rule="they are read whole, as data.train, data.validation or data.test",
            fix="data.streaming=false, and a file with chats or text as data.predict",
        )
    if isinstance(location, Path) and location.suffix.lower() in TEXT_SUFFIXES:
        if section.format not in ("auto", "text"):
            raise DataError(
                f"data.format={section.format} cannot read plain text",
                where=str(location),
                rule="a file of plain text is one document, without fields",
                fix="data.format=auto",
            )
        for record in read(location, split=split, whole=whole, start=start):
            yield Item(Document(record.fields["text"], ends=record.fields["ends"]), record.where)
        return
    yield from _in_format(read(location, split=split, whole=whole, start=start), section)


def _in_format(records: Iterable[Record], section: DataSection) -> Iterator[Item]:
    name = section.format
    for record in records:
        try:
            fields = _renamed(record.fields, section.columns)
            if name == "auto":
                name = _recognise(fields)
            layout = FORMATS.get(name)
            if not layout.fits(fields):
                raise _misfit(name, layout, fields, mixed=section.format == "auto")
            yield Item(layout.read(fields), record.where)
        except DataError as error:
            raise DataError(error.what, where=record.where, rule=error.rule, fix=error.fix or MEND) from None


def _renamed(fields: Fields, columns: dict[str, str]) -> Fields:
    missing = [field for field in columns.values() if field not in fields]
    if missing:
        raise DataError(
            f"data.columns names the field {missing[0]!r}, which is not there",
            rule="keys of this sample: " + ", ".join(map(str, fields)),
        )
    return {**fields, **{key: fields[field] for key, field in columns.items()}}


def _recognise(fields: Fields) -> str:
    for name in FORMATS.names():
        if FORMATS.get(name).fits(fields):
            return name
    raise DataError(
        "no format fits the keys " + ", ".join(map(str, fields)),
        rule="; ".join(f"{name}: {FORMATS.get(name).keys}" for name in FORMATS.names()),
        fix="data.columns={prompt: FIELD, completion: FIELD} renames fields",
    )


def _misfit(name: str, layout: Format, fields: Fields, *, mixed: bool) -> DataError:
    other = next((known for known in FORMATS.names() if FORMATS.get(known).fits(fields)), None)
    if mixed and other:
        return DataError(
            f"mixed formats: this sample is {other}, those before it are {name}",
            rule="a file is in one format; data.train takes a list of files",
        )
    return DataError(
        f"the sample does not fit the format {name}: its keys are " + ", ".join(map(str, fields)),
        rule=f"{name}: {layout.keys}",
        fix=f"data.format={other}" if other else "data.columns={prompt: FIELD, completion: FIELD} renames fields",
    )
