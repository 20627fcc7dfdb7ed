"""Exports that cannot be written where and as they are asked for, and directories that are none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXPORT = ["export", "run.dir=run", "export.format=merged"]
ANOTHER = "export.dir=ANOTHER"
REPLACES = "an export replaces an earlier export alone"
CASES: dict[str, dict[str, Any]] = {
    "format": dict(
        words=["export", "run.dir=run", "export.format=onnx"],
        what="is unknown",
        where="export.format=onnx",
        rule="export format: compressed-tensors",
        fix="there is: adapter",
    ),
    "key of another format": dict(
        words=[*EXPORT, "export.bits=4"],
        what="is no key of 'export'",
        where="export.bits",
        rule="keys of export: format, dir",
        fix="there is:",
    ),
    "bits": dict(
        words=["export", "run.dir=run", "export.format=gptq", "export.bits=5"],
        what="input should be 2, 3, 4 or 8",
        where="export.bits=5",
        rule="2|3|4|8",
        fix="export.bits=4",
    ),
    "group size": dict(
        words=["export", "run.dir=run", "export.format=gptq", "export.group_size=48"],
        what="-1 or one of 16, 32",
        where="export",
        rule="keys of export fit together",
        fix="leave it out",
    ),
    "size of a file": dict(
        words=[*EXPORT, "export.max_shard_size=10GB"],
        what="at most 5 GB",
        where="export.max_shard_size='10GB'",
        rule="largest file of weights",
        fix="export.max_shard_size=1GB",
    ),
    "a directory of something else": dict(
        words=[*EXPORT, "export.dir=full"],
        files={"full/thesis.tex": "x"},
        what="holds something else",
        where="full",
        rule=REPLACES,
        fix=ANOTHER,
    ),
    "a project with a README": dict(
        words=[*EXPORT, "export.dir=full"],
        files={"full/README.md": "# my project\n", "full/thesis.tex": "x"},
        what="holds something else",
        where="full",
        rule=REPLACES,
        fix=ANOTHER,
    ),
    "the model itself": dict(
        words=[*EXPORT, "export.dir={llama}"],
        what="it is model.path",
        where="tiny_llama",
        rule=REPLACES,
        fix=ANOTHER,
    ),
    "a file for a directory": dict(
        words=[*EXPORT, "export.dir=a.txt"],
        files={"a.txt": "x"},
        what="a file lies there",
        where="a.txt",
        rule=REPLACES,
        fix=ANOTHER,
    ),
    "a name that none can have": dict(
        words=[*EXPORT, f"export.dir={'e' * 300}"],
        what="File name too long",
        where="eee",
        rule=REPLACES,
        fix=ANOTHER,
    ),
    "earlier results that are none": dict(
        words=["verify", "run.dir=run"],
        run=lambda run: (run / "export.json").write_text("["),
        what="it cannot be read: Expecting value",
        where="run/export.json",
        rule="one JSON object",
        fix="rm run/export.json",
    ),
    "no export to verify": dict(
        words=["verify", "run.dir=run"],
        what="no export lies here",
        where="run/export",
        rule="a directory with config.json",
        fix="qtrain export run.dir=run",
    ),
    "a path to nothing": dict(
        words=["verify", "run.dir=run", "model.path=nowhere"],
        what="is no directory",
        where="model.path=nowhere",
        rule="an exported directory, or a folder of them",
        fix="qtrain verify run.dir=run",
    ),
    "an export in no format": dict(
        words=["verify", "run.dir=run", "model.path=e"],
        files={"e/config.json": '{"quantization_config": {"quant_method": "nope"}}'},
        what="quant_method='nope'",
        where="e",
        rule="an export is in one of: compressed-tensors",
        fix="a directory that qtrain export wrote",
    ),
    "a description that is a list": dict(
        words=["verify", "run.dir=run", "model.path=e"],
        files={"e/config.json": '{"quantization_config": []}'},
        what="'list' object has no attribute 'get'",
        where="e",
        rule="quantization_config in it",
        fix="export it again",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_export(name: str, refused: Callable[..., str], finished_run: Path) -> None:
    case = dict(CASES[name])
    change = case.pop("run", lambda run: None)

    def copy(here: Path) -> None:
        shutil.copytree(finished_run, here / "run")
        path = here / "run" / "config.yaml"
        path.write_text(path.read_text().replace(str(finished_run), "run"))
        change(here / "run")

    refused(**case, change=copy)
