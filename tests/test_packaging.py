"""What a wheel and an sdist hold: the package, all of it, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qtrain", "callbacks", "recipes")
JUNK = ("__pycache__", "*.pyc", ".*")


def build(kind: str, source: Path, target: Path) -> Path:
    """Call the build backend as pip does without isolation; setuptools comes with the dev extra."""
    target.mkdir()
    program = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(target)!r})"
    result = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the sources, a wheel and an sdist of it, and the wheel built from that sdist."""
    place = tmp_path_factory.mktemp("packaging")
    tree = place / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns(*JUNK))
        else:
            shutil.copy(ROOT / name, tree / name)
    sdist = build("sdist", tree, place / "sdist")
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
        archive.extractall(place / "unpacked", **safe)
    (unpacked,) = (place / "unpacked").iterdir()
    return {
        "tree": tree,
        "wheel": build("wheel", tree, place / "wheel"),
        "sdist": sdist,
        "wheel of the sdist": build("wheel", unpacked, place / "second"),
    }


def files_on_disk(root: Path) -> set[str]:
    """Files under qtrain, the links followed."""
    return {
        (Path(directory) / name).relative_to(root).as_posix()
        for directory, _, names in os.walk(root / "qtrain", followlinks=True)
        if "__pycache__" not in directory
        for name in names
        if not name.startswith(".")
    }


def wheel_files(path: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}


def test_every_directory_with_python_files_is_a_listed_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    modules = [name for name in files_on_disk(ROOT) if name.endswith(".py")]
    assert {name.rpartition("/")[0].replace("/", ".") for name in modules} == set(listed)
    assert {package.replace(".", "/") + "/__init__.py" for package in listed} <= set(modules)


@pytest.mark.parametrize("kind", ["wheel", "wheel of the sdist"])
def test_a_wheel_holds_every_file_of_the_package_and_no_other(archives: dict[str, Path], kind: str) -> None:
    assert wheel_files(archives[kind]) == files_on_disk(archives["tree"])


@pytest.mark.parametrize(
    "pattern",
    [
        "qtrain/py.typed",
        "qtrain/callbacks/*.py",
        "qtrain/recipes/*.yaml",
        "qtrain/recipes/data/demo_train.jsonl",
        "qtrain/recipes/data/demo_validation.jsonl",
        "qtrain/report/*.html",
        "qtrain/report/*.css",
        "qtrain/data/templates/*.jinja",
        "qtrain/export/*.jinja",
    ],
)
def test_what_the_code_opens_at_run_time_is_in_the_wheel(archives: dict[str, Path], pattern: str) -> None:
    assert any(Path(name).match(pattern) for name in wheel_files(archives["wheel"]))


def test_nothing_lands_beside_the_package(archives: dict[str, Path]) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(archives["wheel"]).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"qtrain"}


def test_the_wheel_says_what_it_is(archives: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(archives["wheel"])
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(metadata).decode()
    assert "Name: qtrain\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "qtrain = qtrain.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_sdist_holds_what_a_build_needs(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "callbacks/__init__.py", "recipes/__init__.py"} <= names
