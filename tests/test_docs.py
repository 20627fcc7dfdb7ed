"""The pages of docs/: what they say to add can be added so, and what they link is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qtrain.callbacks
from qtrain.config.compose import load_recipe
from qtrain.verbs.request import read_request
from qtrain.verbs.words import read_words

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PLACE = re.compile(
    r"^`(?P<path>[\w./]+)`, (?P<how>new|one line|one row of `\w+`):\n\n```python\n(?P<code>.*?)```", re.M | re.S
)
AFTER = {"one line": '"kl": ', "one row of `HIGH`": '"kl": '}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:qtrain|tests|benchmarks|recipes)/[\w./-]+\.\w+)`", text):
        assert "NAME" in named or named.endswith("sigma.py") or (ROOT / named).exists(), named


def test_adding_an_observer_takes_a_file_a_line_and_a_row(tmp_path: Path) -> None:
    for name in ("qtrain", "tests/numerics"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    steps = [(m["path"], m["how"], m["code"]) for m in PLACE.finditer((ROOT / "docs/adding.md").read_text("utf-8"))]
    assert [how.split()[-1].strip("`") for _, how, _ in steps] == ["new", "line", "HIGH"]
    for path, how, code in steps:
        file = tmp_path / path
        if how == "new":
            assert not file.exists()
            file.write_text(code, encoding="utf-8")
        else:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            at = next(i for i, line in enumerate(lines) if line.strip().startswith(AFTER[how]))
            assert code.count("\n") == 1
            file.write_text("".join([*lines[: at + 1], code, *lines[at + 1 :]]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    use = "import qtrain; qtrain.load_recipe(None, 'method.name=qat', "
    use += "'method.activation={format: int8, range: static, calibrate: sigma}'); print(qtrain.__file__)"
    there = subprocess.run(
        [sys.executable, "-c", use], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert str(tmp_path) in there.stdout, there.stderr
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "sigma",
        "tests/numerics/test_observers.py",
    ]
    found = subprocess.run(tests, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-2000:] + found.stderr[-1000:]


def test_the_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/adding.md").read_text(encoding="utf-8"), flags=re.S)
    path = tmp_path / "static_llama.yaml"
    path.write_text(recipe, encoding="utf-8")
    assert load_recipe(path).method.name == "qat"


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_callbacks_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/callbacks.md").read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, "docs/callbacks.md", "exec"), namespace)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(qtrain.callbacks.__all__)


def test_troubleshooting_quotes_what_the_program_says() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qtrain").rglob("*.py"))
    source += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "callbacks").rglob("*.py"))
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    quoted = [words for row in rows for words in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 9
    assert [words for words in quoted if words not in source] == []


def test_commands_and_sweeps_of_the_tracking_page_are_taken() -> None:
    text = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].split() for line in re.findall(r"^(?:\w+=\w+ )?qtrain (.+)$", text, re.M)]
    assert {verb for verb, *_ in lines} == {"fit", "export", "report"}
    for verb, *words in lines:
        assert read_words(verb, words) if verb == "report" else read_request(verb, words)
    for file in re.findall(r"^wandb sweep .*?(\S+\.yaml)", text, re.M):
        assert (ROOT / file).is_file()
    (sweep,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.S))
    fixed = [word for word in sweep["command"] if "=" in word]
    parameters = sweep["parameters"].items()
    chosen = [f"{key}={given['value'] if 'value' in given else given['values'][0]}" for key, given in parameters]
    config = read_request("fit", [*fixed, *chosen]).config
    assert config.wandb.enabled and config.optimizer.lr == 1e-5
