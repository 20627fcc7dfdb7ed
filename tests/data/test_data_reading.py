"""Formats, files, and the errors that name file, line and sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from qtrain.data.config import DataSection
from qtrain.data.contents import read_contents
from qtrain.data.formats.record import Content, Conversation, Document, Turn
from qtrain.data.formats.registry import FORMATS
from qtrain.data.reading import read
from qtrain.data.sources import HubSet, locate
from qtrain.errors import DataError

QA = Conversation((Turn("user", "q"), Turn("assistant", "a")))
RECORDS: dict[str, tuple[dict[str, Any], Content]] = {
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        QA,
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, QA),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, QA),
    "text": ({"text": "once"}, Document("once")),
}


def contents(path: Path, **options: Any) -> list[Content]:
    (location,) = locate(str(path))
    return [item.content for item in read_contents(location, DataSection(**options), split="train")]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def error(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        contents(path, **options)
    return str(caught.value)


def test_every_format_has_a_record_here() -> None:
    assert FORMATS.names() == [*RECORDS, "tokens"], "token shards do not come as records"


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_formats_in_files(tmp_path: Path, name: str, suffix: str) -> None:
    record, expected = RECORDS[name]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}")
    elif suffix == ".json":
        path.write_text(json.dumps([record, record], indent=1))
    elif suffix == ".parquet":
        datasets.Dataset.from_list([record, record]).to_parquet(path)
    elif name in ("messages", "sharegpt"):
        pytest.skip("CSV has no lists")
    else:
        datasets.Dataset.from_list([record, record]).to_csv(path)
    if name == "alpaca" and suffix == ".csv":  # An empty cell is null.
        assert contents(path)[0] == expected
    assert contents(path) == contents(path, format=name) == [expected, expected]


def test_more_of_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write(path, {"instruction": "do", "input": "this", "output": "a", "system": "s"})
    assert contents(path) == [Conversation((Turn("system", "s"), Turn("user", "do\nthis"), Turn("assistant", "a")))]
    calls = [("human", "q"), ("function_call", "{}"), ("observation", "7"), ("gpt", "a")]
    write(
        path, {"conversations": [{"from": f, "value": v} for f, v in calls], "tools": '[{"name": "f"}]', "system": ""}
    )
    turns = (Turn("user", "q"), Turn("assistant", "{}"), Turn("tool", "7"), Turn("assistant", "a"))
    assert contents(path) == [Conversation(turns, ({"name": "f"},))]
    parts = [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]
    write(
        path,
        {"messages": [{"role": "assistant", "content": parts, "loss_weight": 0.0}, {"role": "user", "content": ""}]},
    )
    assert contents(path) == [Conversation((Turn("assistant", "ab", trained=False), Turn("user", "")))]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm.jsonl", {"question": "q", "answer": "a"})
    columns = {"prompt": "question", "completion": "answer"}
    assert contents(path, columns=columns) == [QA]
    message = error(path, columns={"prompt": "query"})
    assert f"{path}:1 (sample 1): data.columns names the field 'query'" in message
    assert "question, answer" in message


def test_text_files_are_one_document(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_bytes(b" \n one \r\n\n two")
    assert contents(path) == [Document(" \n one \r\n\n two", ends=False)]
    assert "data.format=alpaca cannot read plain text" in error(path, format="alpaca")
    path.write_bytes(b"abc\xff")
    assert "byte 3 is not UTF-8" in error(path)


def test_streamed_text_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain.data.reading.PIECE", 16)
    path = tmp_path / "wiki.txt"
    text = "".join(f"line {number}\n" for number in range(40))
    path.write_text(text)
    pieces = [record.fields["text"] for record in read(path, split="train", whole=False)]
    assert len(pieces) > 10
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_reading_from_a_record_on(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain.data.reading.PIECE", 16)
    path = tmp_path / f"data{suffix}"
    records = [{"text": f"number {n} of a few\n"} for n in range(6)]
    if suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    elif suffix == ".txt":
        path.write_text("".join(record["text"] for record in records))
    else:
        write(path, *records)
    whole = list(read(path, split="train", whole=False))
    assert list(read(path, split="train", whole=False, start=4)) == whole[4:]


@pytest.mark.parametrize(
    "text,where,what",
    [
        ('{"text": "a"}\n\n{"text": \n', ":3 (sample 2)", "this line is no JSON"),
        ('[\n{"text": "a"},\n{"text" "b"}]', ":3 (sample 2)", "no JSON: Expecting ':' delimiter"),
        ('[\n{"text": "a"},\n', ":3 (sample 2)", "no JSON"),
        ('{"text": "a"}\n[1]\n', ":2 (sample 2)", "a sample is an object, here is [1]"),
        ('["a"]', ":1 (sample 1)", 'a sample is an object, here is "a"'),
    ],
)
def test_bad_json(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert f"{path}{where}: {what}" in error(path)


@pytest.mark.parametrize(
    "record,what",
    [
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "q"}, "'messages' is a string"),
        ({"messages": [{"role": "judge", "content": "q"}]}, "role='judge' is no role"),
        ({"messages": [{"role": "user"}]}, "no key 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of 'content' is not text"),
        ({"messages": [{"role": "user", "content": "q", "loss_weight": 0.5}]}, "loss_weight=0.5"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [1]}]}, "a message has 'tool_calls'"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "from='bot' is no role"),
        ({"conversations": [{"from": "gpt", "value": "q"}], "tools": "{"}, "'tools' is not JSON"),
        ({"instruction": "q", "output": 3}, "'output' is a number"),
        ({"sentence": "q"}, "no format fits the keys sentence"),
    ],
)
def test_wrong_fields(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    good = {"prompt": "q", "completion": "a"}
    path = write(tmp_path / "data.jsonl", record, good)
    assert f"{path}:1 (sample 1): {what}" in error(path)


def test_mixed_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", RECORDS["alpaca"][0], RECORDS["alpaca"][0], RECORDS["sharegpt"][0])
    assert f"{path}:3 (sample 3): mixed formats: this sample is sharegpt, those before it are alpaca" in error(path)
    message = error(path, format="text")
    assert f"{path}:1 (sample 1): the sample does not fit the format text" in message
    assert "data.format=alpaca" in message


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 this is none")
    assert f"{path}: not a readable parquet file" in error(path)


def test_hub_ids_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, config, split, streaming))
        if split == "none":
            raise ValueError("Unknown split 'none'.")
        return datasets.Dataset.from_list([{"text": str(n)} for n in range(5)]).to_iterable_dataset()

    monkeypatch.setattr("qtrain.data.reading.load_dataset", load_dataset)
    texts = [record.fields["text"] for record in read(HubSet("org/name", "main"), split="train", start=2)]
    assert texts == ["2", "3", "4"]
    assert [record.number for record in read(HubSet("x", None, "test[:3]"), split="train", whole=False, start=4)] == [5]
    assert asked == [("org/name", "main", "train", False), ("x", None, "test[:3]", True)]
    with pytest.raises(DataError, match=r"x:none: the hub id cannot be read: Unknown split"):
        list(read(HubSet("x", None, "none"), split="train"))
