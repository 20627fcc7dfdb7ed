"""`qtrain generate-data` on a tiny Llama: stopped and gone on with, refused, extended, trained on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qtrain.training.generate_data as under_test
from qtrain.cli import main
from qtrain.data.tokens.shards import ShardWriter

OPTIONS = {"tokens": 1000, "length": 16, "shard_tokens": 400, "batch_size": 10, "seed": 3}


def words(model: Path, directory: Path, **changes: Any) -> list[str]:
    options = [f"generate_data.{key}={value}" for key, value in (OPTIONS | changes).items()]
    return ["generate-data", f"model.path={model}", f"generate_data.dir={directory}", *options]


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("generated") / "tokens"
    assert main(words(tiny_llama_dir, path)) == 0
    return path


def test_what_lies_there(whole: Path, tiny_llama_dir: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and manifest["dtype"] == "uint16"
    assert manifest["model_path"] == str(tiny_llama_dir)
    assert [shard["rows"] for shard in manifest["shards"]] == [25, 25, 13]
    rows = np.concatenate([np.load(whole / shard["file"]) for shard in manifest["shards"]])
    assert rows.shape == (63, 16) and rows.dtype == np.uint16
    found = manifest["statistics"]
    assert found["rows"] == 63 and found["tokens"] == 1008
    assert found["distinct_1"] == len(np.unique(rows)) / 1008
    assert len(set(rows[:, 0].tolist())) == 63, "every row begins with a token of its own"
    assert 0 < found["entropy"] < np.log(512), "bounded by the vocabulary, from all of which is sampled"


def test_the_same_call_gives_the_same_files(whole: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert main(words(tiny_llama_dir, tmp_path / "again")) == 0
    assert contents(tmp_path / "again") == contents(whole)
    assert main(words(tiny_llama_dir, tmp_path / "other", seed=4)) == 0
    assert contents(tmp_path / "other")["tokens-00001.npy"] != contents(whole)["tokens-00001.npy"]


def test_a_stopped_call_goes_on_to_the_same_files(
    whole: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, write = tmp_path / "tokens", ShardWriter.write

    def stop_at_the_second(self: ShardWriter, number: int, *args: Any, **options: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *args, **options)

    monkeypatch.setattr(ShardWriter, "write", stop_at_the_second)
    assert main(words(tiny_llama_dir, directory)) == 130
    assert set(contents(directory)) == {"manifest.json", "tokens-00000.npy"}
    assert not json.loads((directory / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(ShardWriter, "write", write)
    enough = tmp_path / "enough"
    shutil.copytree(directory, enough)
    assert main(words(tiny_llama_dir, enough, tokens=400)) == 0, "what is there can be enough"
    assert json.loads((enough / "manifest.json").read_text())["complete"]
    numbers = []
    generate = under_test.generate_shard

    def noted(model: Any, vocabulary: Any, section: Any, number: int, rows: int) -> Any:
        numbers.append(number)
        return generate(model, vocabulary, section, number, rows)

    monkeypatch.setattr(under_test, "generate_shard", noted)
    assert main(words(tiny_llama_dir, directory)) == 0
    assert numbers == [1, 2]
    assert contents(directory) == contents(whole)
    monkeypatch.setattr(under_test, "stored_subject", None)
    assert main(words(tiny_llama_dir, directory)) == 0, "nothing to do, and no model loaded for it"
    assert contents(directory) == contents(whole)


def test_a_damaged_shard_is_made_anew(whole: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tokens"
    directory.mkdir()
    for name, content in contents(whole).items():
        (directory / name).write_bytes(content[:-4] if name == "tokens-00001.npy" else content)
    assert main(words(tiny_llama_dir, directory)) == 0
    assert contents(directory) == contents(whole)


def test_more_tokens_are_added(whole: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tokens"
    assert main(words(tiny_llama_dir, directory, tokens=500)) == 0
    assert [shard["rows"] for shard in json.loads((directory / "manifest.json").read_text())["shards"]] == [25, 7]
    assert main(words(tiny_llama_dir, directory)) == 0
    assert contents(directory) == contents(whole)


@pytest.mark.parametrize("change", ["seed=9", "top_k=20", "greedy_lengths=[2]", "length=15"])
def test_another_origin_is_refused(
    whole: Path, tiny_llama_dir: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    assert main([*words(tiny_llama_dir, whole), f"generate_data.{change}"]) == 2
    message = capsys.readouterr().err
    assert change.partition("=")[0] in message and "generate_data.dir=ANOTHER" in message
    assert contents(whole) == before


def test_the_run_directory_is_the_default(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["generate-data", f"model.path={tiny_llama_dir}", "generate_data.tokens=64", "generate_data.length=8"])
        == 0
    )
    assert Path("runs/generate-data/tokens/manifest.json").is_file()
    printed = capsys.readouterr().out
    for fact in ("distinct", "vocabulary", "entropy", "repetitive", "duplicates", "ended"):
        assert fact in printed


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate-data", "--help"]) == 0
    printed = capsys.readouterr().out
    for key in (
        "tokens",
        "length",
        "greedy_lengths",
        "temperature",
        "top_k",
        "batch_size",
        "shard_tokens",
        "seed",
        "dir",
    ):
        assert f"generate_data.{key}" in printed
    assert "data.train" not in printed


# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_fit_on_what_was_generated(whole: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "The dog?", "completion": "It sleeps on, and the fox jumps."}) + "\n")
    fit = [
        "fit",
        f"model.path={tiny_llama_dir}",
        f"data.train={whole}",
        f"data.validation={held_out}",
        "data.max_length=32",
        "data.batch_size=4",
        "method.compute_dtype=fp32",
        "trainer.max_steps=4",
        "trainer.accelerator=cpu",
        "run.save_every=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert main(fit) == 0
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["train"]["samples"] == 63 and facts["train"]["tokens"] == 1008
    assert facts["train"]["loss_tokens"] == 63 * 15
    assert facts["validation"]["samples"] == 1
    again = tmp_path / "again"
    assert main([*fit[:-1], f"run.dir={again}", "trainer.max_steps=2"]) == 0
    assert main([*fit[:-1], f"run.dir={again}", "run.resume=true"]) == 0
    assert losses(again) == losses(tmp_path / "run")
    assert len(losses(again)) == 4
