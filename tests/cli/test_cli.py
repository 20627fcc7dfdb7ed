"""Mistakes on the command line: one clear message, exit 2, and nothing heavy imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qtrain
from qtrain.cli import main
from qtrain.config.compose import load_recipe, recipe_names
from qtrain.config.trainer_args import OWNED, trainer_arguments
from qtrain.export.config import FORMATS
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.verbs.table import VERBS

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run words that must be refused; what stands on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == "", "nothing but the error is shown"
        assert printed.err.startswith("error ")
        assert "Traceback" not in printed.err
        assert not (tmp_path / "runs").exists(), "a refused command leaves nothing"
        return printed.err

    return run


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "Hello", "completion": "Good day"}) + "\n")
    return path


def test_an_unknown_verb(refused: Refused) -> None:
    assert "'fitt' is no verb" in (message := refused("fitt", "recipe=demo"))
    assert "did you mean 'fit'?" in message
    assert "key=value" in message


def test_an_unknown_recipe(refused: Refused) -> None:
    message = refused("fit", "recipe=qlora_lama")
    assert "recipe=qlora_lama is unknown" in message
    assert "did you mean 'qlora_llama'?" in message


def test_an_unknown_argument_of_the_trainer(refused: Refused) -> None:
    message = refused("fit", "recipe=qlora_llama", "trainer.max_step=10")
    assert "trainer.max_step is no argument of lightning.Trainer" in message
    assert "did you mean 'max_steps'?" in message


def test_a_value_of_the_wrong_type(refused: Refused) -> None:
    message = refused("fit", "recipe=qlora_llama", "optimizer.lr=fast")
    assert "optimizer.lr='fast': not a number" in message
    assert "learning rate" in message and "optimizer.lr=0.0002 (the default)" in message


def test_two_mistakes_are_told_together(refused: Refused) -> None:
    message = refused("fit", "optimizer.lr=fast", "trainer.max_step=10")
    assert "optimizer.lr" in message and "trainer.max_step " in message


def test_a_missing_file_is_told_with_its_neighbour(refused: Refused, tiny_llama_dir: Path, chats: Path) -> None:
    message = refused("fit", f"model.path={tiny_llama_dir}", f"data.train={chats.with_name('chat.jsonl')}")
    assert "chat.jsonl: no such file" in message
    assert "chats.jsonl" in message


def test_an_empty_file(refused: Refused, tiny_llama_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    message = refused("fit", f"model.path={tiny_llama_dir}", f"data.train={empty}")
    assert f"{empty}: " in message and "empty" in message.split(f"{empty}: ")[1]


def test_no_data_and_no_model_are_told_together(refused: Refused) -> None:
    message = refused("fit", "trainer.max_steps=1")
    assert "model.path is not set" in message
    assert "data.train is not set" in message


def test_a_missing_model(refused: Refused, chats: Path, tmp_path: Path) -> None:
    message = refused("fit", f"model.path={tmp_path}/llama.gguf", f"data.train={chats}")
    assert "llama.gguf does not exist" in message


def test_a_model_that_is_only_a_pickle(refused: Refused, chats: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"x")
    message = refused("fit", f"model.path={model}", f"data.train={chats}")
    assert "only pytorch_model.bin" in message
    assert "pickle files run code" in message


def test_a_word_without_a_value(refused: Refused) -> None:
    assert "'demo' is no override" in refused("fit", "demo")


@pytest.mark.parametrize("verb", ["export"])
def test_verbs_on_a_run_want_one(refused: Refused, verb: str, tmp_path: Path) -> None:
    message = refused(verb, f"run.dir={tmp_path / 'nothing'}")
    assert "nothing trained lies here" in message and "qtrain fit" in message


def test_recipes_takes_no_arguments(refused: Refused) -> None:
    assert "takes no arguments" in refused("recipes", "recipe=demo")


@pytest.mark.parametrize("verb", [name for name in VERBS.names() if VERBS.get(name).sections])
def test_help_lists_every_key_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert VERBS.get(verb).help in printed.out
    shown = {line.split()[0] for line in printed.out.splitlines() if line.startswith("  ") and "." in line.split()[0]}
    sections = VERBS.get(verb).sections
    assert {"model.path", "model.dtype", "run.dir", "run.seed"} <= shown
    assert ("optimizer.lr" in shown) == (verb in ("fit", "plan"))
    if "method" in sections:
        assert {f"method.{key}" for key in QLoraOptions.model_fields} <= shown
    if "export" in sections:
        keys = {f"export.{key}" for name in FORMATS.names() for key in FORMATS.get(name).model_fields}
        assert keys <= shown
    if "trainer" in sections:
        assert set(trainer_arguments()) - set(OWNED) <= {word.strip(",") for word in printed.out.split()}


def test_help_shows_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    row = lines.index("optimizer.lr number = 0.0002")
    assert lines[row + 1] == "learning rate at its highest"
    assert "method.base nf4|fp4|int8|packed|checkpoint|none = nf4" in lines
    assert "data.train text or list of text = null" in lines


def test_recipes_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert all(rows[name][1] == load_recipe(name).method.name for name in recipe_names())
    assert "…" not in printed
    assert "faster than QLoRA where 16-bit weights fit" in " ".join(printed.split())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*VERBS.names(), *recipe_names()))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"qtrain {qtrain.__version__}"


def test_mistakes_are_answered_at_once_and_without_torch(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    mistakes = [
        ["fit", "recipe=qlora_lama"],
        ["fit", "recipe=qlora_llama", "trainer.max_step=10"],
        ["fit", "recipe=qlora_llama", "optimizer.lr=fast"],
        ["fit", "recipe=qlora_llama", f"data.train={tmp_path}/none.jsonl"],
        ["fit", "recipe=qlora_llama", f"data.train={empty}"],
    ]
    program = (
        "import sys, time\n"
        "begin = time.process_time()\n"
        "from qtrain.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "print(status, sorted(heavy), time.process_time() - begin)\n"
    )
    for words in mistakes:
        result = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        status, heavy, seconds = result.stdout.rsplit(maxsplit=2)
        assert (status, heavy) == ("2", "[]"), (words, result.stdout, result.stderr)
        assert result.stderr.startswith("error ") and "Traceback" not in result.stderr
        # Processor time, which a busy machine does not stretch; with a cold disk the rest is reading.
        assert float(seconds) < 2.0, words
