"""Data that cannot be trained on: files, samples, templates, token shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

VALIDATE = ["validate", "model.path={llama}", "data.validation=data.jsonl"]
TOKENS = ["validate", "model.path={llama}", "data.validation=tokens"]
GOOD = '{"prompt": "a", "completion": "b"}\n'
MEND = "correct that sample"


def of(name: str, *more: str) -> list[str]:
    return [*VALIDATE[:2], f"data.validation={name}", *more]


CASES: dict[str, dict[str, Any]] = {
    "no such file": dict(
        words=of("date.jsonl"),
        files={"data.jsonl": GOOD},
        what="no such file",
        where="data.validation=date.jsonl",
        rule="a hub id",
        fix="did you mean data.jsonl?",
    ),
    "empty file": dict(
        words=VALIDATE,
        files={"data.jsonl": ""},
        what="the file is empty",
        where="data.validation=data.jsonl",
        rule="at least one sample",
        fix="write it again",
    ),
    "suffix": dict(
        words=of("data.pkl"),
        files={"data.pkl": pickle.dumps([1])},
        what="unknown suffix '.pkl'",
        where="data.pkl",
        rule="data files end in .json",
        fix="pickle is never read",
    ),
    "pipe": dict(
        words=of("pipe.jsonl"),
        change=lambda here: os.mkfifo(here / "pipe.jsonl"),
        what="neither a file nor a directory",
        where="pipe.jsonl",
        rule="read more than once",
        fix="write it to a file",
    ),
    "link in a circle": dict(
        words=of("loop.jsonl"),
        change=lambda here: (here / "loop.jsonl").symlink_to("loop.jsonl"),
        what="cannot be looked at: Too many levels of symbolic links",
        where="loop.jsonl",
        rule="a hub id",
        fix="check the path",
    ),
    "name too long": dict(
        words=of("x" * 300),
        what="File name too long",
        where="data.validation=xxx",
        rule="a file, a directory",
        fix="check the path",
    ),
    "file of a package, outside": dict(
        words=of("package:yaml/../../x.jsonl"),
        what="no such file in the package",
        where="package:yaml/../../x.jsonl",
        rule="a file inside an installed package",
        fix="there is:",
    ),
    "directory without data": dict(
        words=of("folder"),
        files={"folder/notes.doc": "x"},
        what="no data files",
        where="folder",
        rule="data files end in",
        fix="another directory",
    ),
    "list of nothing": dict(
        words=of("[]"), what="names nothing", where="data.validation", rule="a file", fix="data.validation=null"
    ),
    "line that is no JSON": dict(
        words=VALIDATE,
        files={"data.jsonl": GOOD + '{"prompt": \n'},
        what="no JSON: Expecting value at column",
        where="data.jsonl:2 (sample 2)",
        rule="one object a line",
        fix=MEND,
    ),
    "number of 5000 digits": dict(
        words=VALIDATE,
        files={"data.jsonl": f'{{"text": {"1" * 5000}}}'},
        what="Exceeds the limit (4300 digits)",
        where="data.jsonl:1",
        rule="one object a line",
        fix=MEND,
    ),
    "levels without end": dict(
        words=VALIDATE,
        files={"data.jsonl": '{"text": ' + "[" * 100_000 + "}"},
        what="too deep in one another",
        where="data.jsonl:1",
        rule="one object a line",
        fix=MEND,
    ),
    "half a character": dict(
        words=VALIDATE,
        files={"data.jsonl": GOOD.replace('"a"', '"a\\ud800"')},
        what="half a character at 1",
        where="data.jsonl:1 (sample 1)",
        rule="a surrogate comes with its other half",
        fix="surrogatepass",
    ),
    "sample that is no object": dict(
        words=VALIDATE,
        files={"data.jsonl": "[[1]]"},
        what="a sample is an object, here is [1]",
        where="data.jsonl:1",
        rule="an array of objects",
        fix=MEND,
    ),
    "text that is a number": dict(
        words=VALIDATE,
        files={"data.jsonl": '{"text": 3}'},
        what="'text' is a number",
        where="data.jsonl:1",
        rule="'text' must be a string",
        fix=MEND,
    ),
    "role": dict(
        words=VALIDATE,
        files={"data.jsonl": '{"messages": [{"role": "judge", "content": "x"}]}'},
        what="role='judge' is no role",
        where="data.jsonl:1",
        rule="roles: system, developer",
        fix=MEND,
    ),
    "keys of no format": dict(
        words=VALIDATE,
        files={"data.jsonl": '{"sentence": "x"}'},
        what="no format fits the keys sentence",
        where="data.jsonl:1",
        rule="alpaca: instruction, output",
        fix="data.columns={prompt: FIELD",
    ),
    "no token with loss": dict(
        words=VALIDATE,
        files={"data.jsonl": '{"messages": [{"role": "user", "content": "only a user"}]}'},
        what="all 1 samples are masked",
        where="data.jsonl:1",
        rule="data.train_on=assistant",
        fix="data.train_on=all",
    ),
    "bytes that are no UTF-8": dict(
        words=of("notes.txt"),
        files={"notes.txt": b"abc\xff"},
        what="byte 3 is not UTF-8",
        where="notes.txt",
        rule="read as UTF-8",
        fix="save the file as UTF-8",
    ),
    "table": dict(
        words=of("data.parquet"),
        files={"data.parquet": b"PAR1xxxxPAR1"},
        what="not a readable parquet file",
        where="data.parquet",
        rule="a row for each sample",
        fix="to_parquet",
    ),
    "template with a division by zero": dict(
        words=[*VALIDATE, "data.chat_template=t.jinja"],
        files={"data.jsonl": GOOD, "t.jinja": "{{ 1 / 0 }}"},
        what="division by zero",
        where="data.jsonl:1",
        rule="roles here: user",
        fix="data.chat_template=chatml",
    ),
    "template that is no Jinja": dict(
        words=[*VALIDATE, "data.chat_template=t.jinja"],
        files={"data.jsonl": GOOD, "t.jinja": "{% for x in %}"},
        what="no Jinja template: Expected an expression",
        where="t.jinja:1",
        rule="a file with a Jinja template",
        fix="data.chat_template=chatml",
    ),
    "template that looks behind the scenes": dict(
        words=[*VALIDATE, "data.chat_template=t.jinja"],
        files={"data.jsonl": GOOD, "t.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        what="access to attribute '__class__' of 'str' object is unsafe",
        where="data.jsonl:1",
        rule="roles here",
        fix="data.chat_template=chatml",
    ),
}


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zipped(size: int) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, np.zeros(size, dtype="uint8"))
    return stream.getvalue()


def claims(shape: tuple[int, ...]) -> bytes:
    """A header that promises what does not follow."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("marker", "w")


SHARDS: dict[str, tuple[dict[str, Any], bytes, dict[str, str]]] = {
    "another tokenizer": (
        {"tokenizer_size": 7},
        b"",
        dict(what="7 entries", where="tokens", rule="the tokenizer they were made with", fix="qtrain generate-data"),
    ),
    "outside of its directory": (
        {"file": "../tokens-00000.npy"},
        b"",
        dict(what="shards.0.file", where="manifest.json", rule="a manifest of version 1", fix="delete tokens"),
    ),
    "zip bomb": (
        {},
        zipped(10**7),
        dict(what="it is no NumPy array", where="tokens-00000.npy", rule="bit by bit", fix="delete it"),
    ),
    "pickle": (
        {},
        saved(np.array([Evil()], dtype=object)),
        dict(what="[1] object", where="tokens-00000.npy", rule="[2, 16] uint16", fix="delete it"),
    ),
    "promise of a terabyte": (
        {},
        claims((10**11, 16)),
        dict(what="[100000000000, 16] uint16 in 192 bytes", where="tokens-00000.npy", rule="[2, 16]", fix="delete it"),
    ),
    "ids beyond the vocabulary": (
        {},
        saved(np.full((2, 16), 60_000, dtype="uint16")),
        dict(what="an id of 60000", where="tokens", rule="lie below", fix="qtrain generate-data"),
    ),
    "changed bytes": (
        {"sha256": "0" * 64},
        b"",
        dict(what="its SHA-256 is another", where="tokens-00000.npy", rule="bit by bit", fix="delete it"),
    ),
    "not all there": (
        {"complete": False},
        b"",
        dict(what="not complete", where="tokens", rule="trained on whole", fix="generate-data` as before"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_data(name: str, refused: Callable[..., str]) -> None:
    refused(**CASES[name])


@pytest.mark.parametrize("name", SHARDS)
def test_wrong_token_shards(name: str, refused: Callable[..., str], tiny_llama_dir: Path, place: Path) -> None:
    changes, content, parts = SHARDS[name]
    content = content or saved(np.ones((2, 16), dtype="uint16"))
    file = changes.get("file", "tokens-00000.npy")
    origin = {"model": "x", "length": 16, "shard_rows": 2, "seed": 0, "options": {}}
    size = len(AutoTokenizer.from_pretrained(tiny_llama_dir))
    manifest = {
        "format": "qtrain tokens",
        "model_path": "x",
        "dtype": "uint16",
        "origin": origin | {"tokenizer_size": changes.get("tokenizer_size", size)},
        "complete": changes.get("complete", True),
        "shards": [{"file": file, "rows": 2, "sha256": changes.get("sha256", hashlib.sha256(content).hexdigest())}],
    }
    refused(TOKENS, files={f"tokens/{file}": content, "tokens/manifest.json": json.dumps(manifest)}, **parts)
    assert not (place / "marker").exists()
