"""Sources are checked before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qtrain.data.config import DataSection
from qtrain.data.sources import HubSet, check_sources, locate, locate_all
from qtrain.errors import DataError


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.TXT").write_text("x")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden.json").write_text("x")
    (tmp_path / "picture.png").write_text("x")
    assert locate(str(tmp_path)) == [tmp_path / "b.jsonl", tmp_path / "part" / "a.TXT"]
    assert locate_all([str(tmp_path / "b.jsonl"), "org/name"]) == [tmp_path / "b.jsonl", HubSet("org/name")]
    assert locate_all(None) == []


@pytest.mark.parametrize(
    "entry,expected",
    [
        ("imdb", HubSet("imdb")),
        ("openai/gsm8k[main]:train", HubSet("openai/gsm8k", "main", "train")),
        ("org/set-1.5:test[:10%]", HubSet("org/set-1.5", None, "test[:10%]")),
    ],
)
def test_hub_ids(entry: str, expected: HubSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(entry) == [expected]
    assert str(expected) == entry


@pytest.mark.parametrize(
    "entry,what,hint",
    [
        ("data/tran.jsonl", "no such file", "did you mean data/train.jsonl?"),
        ("data/tran", "no such file", "did you mean data/train.jsonl?"),
        ("nowhere/deep/train.jsonl", "no such file", "there is no directory nowhere/deep"),
        ("./imdb", "no such file", "a file in"),
        ("data/empty.json", "the file is empty", "at least one sample"),
        ("data/weights.bin", "unknown suffix '.bin'", ".jsonl"),
        ("data/void", "the directory has no data files", ".parquet"),
    ],
)
def test_mistakes(entry: str, what: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "void").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    (tmp_path / "data" / "empty.json").touch()
    (tmp_path / "data" / "weights.bin").write_text("x")
    errors = check_sources(DataSection(train=entry, validation=["imdb", entry]))
    assert [error.where for error in errors] == [f"data.train={entry}", f"data.validation={entry}"]
    assert all(what in str(error) and hint in str(error) for error in errors)


def test_template_file_is_checked(tmp_path: Path) -> None:
    assert check_sources(DataSection(chat_template="chatml")) == []
    (error,) = check_sources(DataSection(chat_template=str(tmp_path / "none.jinja")))
    assert isinstance(error, DataError)
    assert "data.chat_template=" in str(error)


def test_format_is_checked() -> None:
    with pytest.raises(ValidationError, match="did you mean 'alpaca'"):
        DataSection(format="alpacca")


def test_no_torch() -> None:
    code = (
        "import sys; from qtrain.data.config import DataSection; from qtrain.data.sources import check_sources\n"
        "check_sources(DataSection(train='imdb'))\n"
        "assert not {'torch', 'transformers', 'datasets', 'lightning', 'numpy'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
