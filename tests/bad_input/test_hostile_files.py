"""Files made to do harm: none of their code runs, none of their lies is believed, nothing outside is touched."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.cli import main
from qtrain.errors import ModelError
from qtrain.models.config import ModelSection
from qtrain.models.gguf_header import check_gguf
from qtrain.models.load import load_model, load_tokenizer
from qtrain.models.packed import load_packed
from qtrain.training.run_directory import RunDirectory

VALIDATE = ["validate", "model.path=model", "data.validation=text.txt"]
INDEX = "model.safetensors.index.json"


class Evil:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


@pytest.fixture
def model(place: Path, tiny_llama_dir: Path) -> Path:
    shutil.copytree(tiny_llama_dir, place / "model")
    (place / "text.txt").write_text("the dog sleeps on\n" * 20)
    (place / "marker.py").write_text("open('marker', 'w')\n")
    return place / "model"


@pytest.fixture
def harmless(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run words that must be refused; nothing was run."""

    def run(words: list[str]) -> str:
        assert main(words) == 2
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err and not (place / "marker").exists()
        return printed.err

    return run


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt"])
def test_pickles_are_no_weights(file: str, model: Path, harmless: Callable[[list[str]], str]) -> None:
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(pickle.dumps(Evil()))
    assert "weights are read from safetensors alone" in harmless(VALIDATE)
    assert f"model.path=model/{file} is a" in harmless(["validate", f"model.path=model/{file}", *VALIDATE[2:]])
    assert "unknown suffix" in harmless(["validate", VALIDATE[1], f"data.validation=model/{file}"])


def test_a_pickle_by_the_name_of_safetensors(model: Path, harmless: Callable[[list[str]], str]) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "it cannot be read" in harmless(VALIDATE)


def test_an_index_that_names_a_pickle(model: Path, harmless: Callable[[list[str]], str]) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "rest.safetensors")
    torch.save(Evil(), model / "shard.bin")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shard.bin")}))
    assert "shards are safetensors that lie beside their index" in harmless(VALIDATE)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "{here}/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_an_index_that_leads_outside(
    target: str, model: Path, place: Path, harmless: Callable[[list[str]], str]
) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(place / "outside.safetensors")
    (model / "some.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    file = target.format(here=place)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    message = harmless(VALIDATE)
    assert repr(file) in message and "lie beside their index" in message


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_that_lead_outside(file: str, model: Path, place: Path, harmless: Callable[[list[str]], str]) -> None:
    (model / file).rename(place / "outside")
    (model / file).symlink_to(place / "outside")
    assert "outside of the directory" in harmless(VALIDATE)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(model: Path, place: Path) -> None:
    cache = place / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    shutil.move(model, cache / "snapshots" / "0123")
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(cache / "blobs" / "ab")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab")
    assert load_model(ModelSection(path=str(snapshot)), torch.float32).config.model_type == "llama"


def lying(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def of(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "a header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "a huge header": lying(b"{" + b" " * (101 * 2**20) + b"}"),
    "offsets that overlap": lying({"a": of([2], [0, 8]), "b": of([2], [4, 12])}, bytes(12)),
    "offsets beyond the file": lying({"a": of([2], [0, 80])}, bytes(8)),
    "a hole": lying({"a": of([1], [4, 8])}, bytes(8)),
    "a shape that overflows": lying({"a": of([2**40, 2**40], [0, 8])}, bytes(8)),
    "a shape below zero": lying({"a": of([-2], [0, 8])}, bytes(8)),
    "a dtype that is none": lying({"a": of([2], [0, 8], "X9")}, bytes(8)),
    "a header that is a list": lying([1]),
    "levels without end": lying(b'{"a":' + b"[" * 100_000 + b"}"),
    "no tensor at all": lying({}),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_that_lie(name: str, model: Path, harmless: Callable[[list[str]], str]) -> None:
    (model / "model.safetensors").write_bytes(LIES[name])
    begin = time.process_time()
    message = harmless(VALIDATE)
    assert time.process_time() - begin < 2
    assert "it cannot be read" in message or "0 tensors are there" in message


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int, values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def array(kind: int, count: int) -> bytes:
    return gguf(0, 1, text("a") + struct.pack("<IIQ", 9, kind, count))


BOMBS = {
    "values": gguf(0, 2**60),
    "tensors": gguf(2**60, 0),
    "an array of 2^40 bytes": array(0, 2**40),
    "an array of 2^40 strings": array(8, 2**40),
    "arrays in arrays": gguf(0, 1, text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000),
    "a string of 2^62 bytes": gguf(0, 1, struct.pack("<Q", 2**62)),
    "a string of 2^64 - 1 bytes": gguf(0, 1, struct.pack("<Q", 2**64 - 1)),
    "2^31 dimensions": gguf(1, 0, text("t") + struct.pack("<I", 2**31) + bytes(40)),
    "a tensor of 2^60 numbers": gguf(1, 0, text("t") + struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0)),
    "a type that is none": gguf(1, 0, text("t") + struct.pack("<IQIQ", 1, 1, 9999, 0)),
    "an alignment of zero": gguf(0, 1, text("general.alignment") + struct.pack("<II", 4, 0)),
    "another version": gguf(0, 0, version=99),
    "the middle of a header": gguf(0, 1, text("general.architecture") + struct.pack("<I", 8)),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_gguf_files_that_promise_too_much(name: str, place: Path) -> None:
    (place / "m.gguf").write_bytes(BOMBS[name])
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as caught:
        check_gguf(place / "m.gguf")
    with pytest.raises(ModelError):
        load_model(ModelSection(path="m.gguf"), torch.float32)
    assert caught.value.rule and caught.value.fix and "m.gguf" in str(caught.value)
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 2**10, "less than 100 MiB"


def test_code_that_comes_with_a_model_is_never_run(model: Path, place: Path) -> None:
    (model / "ours.py").write_text(f"open({str(place / 'marker')!r}, 'w')\n")
    content = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "ours.C", "AutoModelForCausalLM": "ours.M", "AutoTokenizer": ["ours.T", None]}
    section = ModelSection(path=str(model))
    (model / "config.json").write_text(json.dumps(content | {"auto_map": auto}))
    load_model(section, torch.float32)  # its architecture is one that transformers has: the map is left alone
    for kind in ("ours", None):
        (model / "config.json").write_text(json.dumps({**content, "model_type": kind, "auto_map": auto}))
        for load in (lambda: load_model(section, torch.float32), lambda: load_packed(model, torch.float32)):
            with pytest.raises(ModelError):
                load()
    (model / "config.json").write_text(json.dumps(content))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Ours", "auto_map": {"AutoTokenizer": ["ours.T", None]}})
    )
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load_tokenizer(section)
    assert not (place / "marker").exists()


def test_kernels_of_the_hub_are_code_too(model: Path, harmless: Callable[[list[str]], str]) -> None:
    assert "compiled code" in harmless([*VALIDATE, "model.attention=kernels-community/evil"])
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"attn_implementation": "someone/evil"}))
    assert "kernel of the hub" in harmless(VALIDATE)


RECIPES = {
    "a tag": "run: {name: !!python/object/apply:os.mkdir [marker]}\n",
    "a tag of a module": "run: {name: !!python/module:marker ''}\n",
    "a tag of a name": "run: {name: !!python/name:os.mkdir ''}\n",
    "the environment": "run: {name: '${oc.env:HOME}'}\n",
    "a resolver in a reference": "run: {name: '${run.${oc.env:HOME}}'}\n",
    "a resolver with spaces": "run: {name: '${ oc.env : HOME }'}\n",
    "a resolver in a list": "data: {train: [a, '${oc.decode:[1]}']}\n",
    "aliases by nine to the ninth": "a: &a [x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias of itself": "run: &a {name: *a}\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_data(name: str, place: Path, harmless: Callable[[list[str]], str]) -> None:
    (place / "marker.py").write_text("open('marker', 'w')\n")
    (place / "r.yaml").write_text(RECIPES[name])
    begin = time.process_time()
    assert "r.yaml" in harmless(["fit", "recipe=r.yaml"])
    assert time.process_time() - begin < 2
    if "\n" not in (line := RECIPES[name].removesuffix("\n")) and "name: " in line:
        harmless(["fit", "run.name=" + line.partition("name: ")[2].removesuffix("}").strip("'")])
    assert os.environ["HOME"] not in "".join(path.read_text() for path in place.glob("*.yaml"))


def test_clearing_a_run_follows_no_links(place: Path) -> None:
    (place / "precious").mkdir()
    (place / "precious" / "thesis.tex").write_text("x")
    run = RunDirectory(place / "run")
    run.path.mkdir()
    for name in ("checkpoints", "adapter", "export"):
        (run.path / name).symlink_to(place / "precious")
    run.clear()
    assert (place / "precious" / "thesis.tex").read_text() == "x"
