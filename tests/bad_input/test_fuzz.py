"""Random bytes and words: a success or a typed error, never another exception; what once failed stays in tests/corpus.

The corpus is replayed whole. A directory says who reads its files: ``config`` recipes and, in ``words.txt``, overrides
a line; ``data`` files of data by suffix; ``packed`` safetensors by layout and GGUF files.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtrain.config.compose import load_recipe
from qtrain.data.config import DataSection
from qtrain.data.contents import read_contents
from qtrain.data.sources import locate
from qtrain.errors import QtrainError
from qtrain.models.gguf_header import check_gguf
from qtrain.models.packed import load_packed

CORPUS = Path(__file__).parent.parent / "corpus"
SHORT = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
PROFILES = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
SUFFIXES = ("json", "jsonl", "parquet", "csv", "txt")
KEYS = (
    "model.path",
    "data.train",
    "data.columns",
    "method.name",
    "method.r",
    "run",
    "run.name",
    "trainer.max_steps",
    "x",
)
VALUES = st.text(max_size=30) | st.sampled_from(
    [
        "[1,[2",
        "{a: 1}",
        "${run.name}",
        "${oc.env:X}",
        "!!python/name:os.mkdir",
        "&a [*a]",
        "2e-4",
        "null",
        "\\x00",
        "? x",
    ]
)
YAML = st.text(alphabet="abrun:{}[]-&*!$'\"\\ \n\t0123456789.#|>?%@,", max_size=200)
JSON = st.text(alphabet='{}[]":,text\\ud80 \n0123456789.eE-+NaInfity', max_size=200).map(str.encode)

# pandas and pyarrow leave files that they stumbled over to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def typed() -> Iterator[None]:
    """Nothing but success or a typed error comes out; libraries may warn of what they read."""
    with warnings.catch_warnings(), contextlib.suppress(QtrainError):
        warnings.simplefilter("ignore")
        yield


def read_data(path: Path) -> None:
    with typed():
        for location in locate(str(path)):
            for _ in read_contents(location, DataSection(), split="train"):
                pass


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Such files are collected here, where the warning of them is expected, and not in whichever test comes next."""
    yield
    gc.collect()


def read_words(*words: str, recipe: Path | None = None) -> None:
    with typed():
        load_recipe(recipe, *words)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sound file of each kind, to be damaged."""
    folder = tmp_path_factory.mktemp("samples")
    rows = datasets.Dataset.from_list([{"prompt": f"question {n}", "completion": "answer"} for n in range(5)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows.to_parquet(folder / "a.parquet")
        rows.to_csv(folder / "a.csv")
        rows.to_json(folder / "a.jsonl")
    (folder / "a.json").write_text('[{"messages": [{"role": "user", "content": "q"}]}]')
    (folder / "a.txt").write_text("größer\n" * 9)
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in SUFFIXES}


@st.composite
def damage(draw: st.DrawFn, length: int) -> Callable[[bytes], bytes]:
    """Up to four bytes that become others, and perhaps an end that is missing; half of it in the header."""
    places = draw(st.lists(st.integers(0, min(length, 4096) - 1) | st.integers(0, length - 1), max_size=4))
    values = [draw(st.integers(0, 255)) for _ in places]
    end = draw(st.none() | st.integers(0, length))

    def apply(content: bytes) -> bytes:
        changed = bytearray(content)
        for place, value in zip(places, values, strict=True):
            changed[place] = value
        return bytes(changed[:end])

    return apply


@pytest.mark.parametrize("profile", PROFILES)
def test_overrides(profile: settings) -> None:
    words = st.lists(st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=20), VALUES), max_size=4)
    profile(given(words)(lambda found: read_words(*found)))()


@pytest.mark.parametrize("profile", PROFILES)
def test_recipes(profile: settings, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_words(recipe=path)

    profile(given(YAML.map(str.encode) | st.binary(max_size=60))(check))()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_data(profile: settings, suffix: str, samples: dict[str, bytes], tmp_path: Path) -> None:
    path, sample = tmp_path / f"a.{suffix}", samples[suffix]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_data(path)

    damaged = damage(len(sample)).map(lambda apply: apply(sample))
    texts = (JSON | damaged) if suffix.startswith("json") else damaged
    profile(given(texts | st.binary(max_size=100))(check))()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors", "gguf"])
def test_packed_files(profile: settings, layout: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(exported(layout), tmp_path / "model")
    files = list((tmp_path / "model").glob("*.gguf")) or [
        tmp_path / "model" / name for name in ("model.safetensors", "config.json")
    ]

    def check_of(path: Path, sample: bytes) -> Callable[[Callable[[bytes], bytes]], None]:
        def check(apply: Callable[[bytes], bytes]) -> None:
            path.write_bytes(apply(sample))
            with typed():
                check_gguf(path) if layout == "gguf" else load_packed(path.parent, torch.float32)

        return check

    for path in files:
        sample = path.read_bytes()
        profile(given(damage(len(sample)))(check_of(path, sample)))()
        path.write_bytes(sample)


@pytest.mark.parametrize("path", sorted((CORPUS / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_corpus(path: Path) -> None:
    read_words(recipe=path)


def test_overrides_of_the_corpus() -> None:
    lines = (CORPUS / "config" / "words.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 5
    for line in lines:
        read_words(line)


@pytest.mark.parametrize("path", sorted((CORPUS / "data").iterdir()), ids=lambda path: path.name)
def test_data_of_the_corpus(path: Path) -> None:
    read_data(path)


@pytest.mark.parametrize("path", sorted((CORPUS / "packed").iterdir()), ids=lambda path: path.name)
def test_packed_files_of_the_corpus(path: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    if path.suffix == ".gguf":
        with pytest.raises(QtrainError):
            check_gguf(path)
        return
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    shutil.copy(path, tmp_path / "model" / ("config.json" if path.suffix == ".json" else "model.safetensors"))
    with pytest.raises(QtrainError):
        load_packed(tmp_path / "model", torch.float32)


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 100_000
