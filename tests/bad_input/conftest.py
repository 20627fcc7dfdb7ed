"""What every refusal of a wrong input has to be: a typed message in four parts, at once, and nothing else touched."""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

# Loading libraries takes seconds; what is measured below is the answer.
import datasets  # noqa: F401
import lightning  # noqa: F401
import peft  # noqa: F401
import pytest

import qtrain
from qtrain.cli import main
from qtrain.console import hush
from qtrain.errors import QtrainError

Change = Callable[[Path], object]
Refused = Callable[..., str]
SECONDS = 2.0


def tree(*folders: Path) -> dict[str, str]:
    """Every entry below the folders, with the hash of its bytes or where it points to."""
    found = {}
    for path in (entry for folder in folders for entry in [folder, *folder.rglob("*")]):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
    return found


def has_parts(message: str, what: str, where: str, rule: str, fix: str) -> None:
    """The four parts of an error, each with the words of this very case."""
    lines = message.splitlines()
    first = [line for line in lines if not line.startswith(("  rule: ", "  try:  "))]
    rules = [line for line in lines if line.startswith("  rule: ")]
    fixes = [line for line in lines if line.startswith("  try:  ")]
    for part, found, name in (
        (what, first, "what"),
        (where, first, "where"),
        (rule, rules, "rule"),
        (fix, fixes, "fix"),
    ):
        assert part, f"a case names the {name} it expects"
        assert any(part in line for line in found), f"{name}: {part!r} is not in\n{message}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def refused(place: Path, tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run words that must be refused in a directory of these files; what stands on stderr.

    ``{llama}`` in a word is a sound model. ``model`` is changed in a copy of it, which lies in ``model``.
    """

    def run(
        words: list[str],
        *,
        what: str,
        where: str,
        rule: str,
        fix: str,
        files: Mapping[str, str | bytes] | None = None,
        change: Change | None = None,
        model: Change | None = None,
        loads: bool = False,
    ) -> str:
        for name, content in (files or {}).items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        if model is not None:
            shutil.copytree(tiny_llama_dir, place / "model")
            model(place / "model")
        if change is not None:
            change(place)
        before = tree(place, tiny_llama_dir)
        begin = time.thread_time()
        status = main([word.replace("{llama}", str(tiny_llama_dir)) for word in words])
        seconds = time.thread_time() - begin
        printed = capfd.readouterr()
        assert status == 2, printed.err
        assert "Traceback" not in printed.err
        message = printed.err[printed.err.index("error ") + len("error ") :]
        has_parts(message, what, where, rule, fix)
        assert tree(place, tiny_llama_dir) == before, "nothing is written and nothing is lost"
        assert loads or seconds < SECONDS, f"{seconds:.1f} s"
        return message

    return run


@pytest.fixture
def raised(place: Path) -> Callable[..., QtrainError]:
    """Call what must raise a typed error with these parts."""

    def call(
        kind: type[QtrainError], function: Callable[[], object], *, what: str, where: str, rule: str, fix: str
    ) -> QtrainError:
        before = tree(place)
        with pytest.raises(kind) as caught:
            function()
        has_parts(str(caught.value), what, where, rule, fix)
        assert tree(place) == before
        return caught.value

    return call


@pytest.fixture(scope="session")
def finished_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of LoRA and what they left; to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.txt"
    text.write_text("the dog sleeps on and the fox jumps over it\n" * 40)
    config = qtrain.load_recipe(
        None,
        f"model.path={tiny_llama_dir}",
        f"data.train={text}",
        "data.max_length=32",
        "data.batch_size=2",
        "method.base=none",
        "method.r=2",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        f"run.dir={folder / 'run'}",
        "run.save_every=1",
    )
    with warnings.catch_warnings():
        hush()  # as the command line does
        qtrain.fit(config)
    return folder / "run"


@pytest.fixture(scope="session")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """That run in a format, written once; to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(name: str) -> Path:
        grouped = [] if name in ("gguf", "merged") else ["export.group_size=32"]
        with warnings.catch_warnings():
            words = [f"run.dir={finished_run}", f"export.format={name}", f"export.dir={folder / name}", *grouped]
            before = (finished_run / "export.json").exists()
            assert main(["export", *words, "export.evaluate=false", "export.verify=false"]) == 0
            if not before:
                (finished_run / "export.json").unlink()
        return folder / name

    return export
