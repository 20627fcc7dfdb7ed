"""Configs that are none: words, recipes, sections, values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUBMIT = ["fit", "recipe=r.yaml"]
CASES: dict[str, dict[str, Any]] = {
    "verb": dict(words=["fitt"], what="'fitt' is no verb", where="fitt", rule="qtrain VERB", fix="did you mean 'fit'?"),
    "section": dict(
        words=["fit", "modle.path=x"],
        what="'modle' is no section",
        where="modle",
        rule="keys belong to sections: data, distill",
        fix="did you mean 'model'?",
    ),
    "key": dict(
        words=["fit", "model.pth=x"],
        what="is no key of 'model'",
        where="model.pth",
        rule="keys of model: path, revision",
        fix="did you mean 'path'?",
    ),
    "type": dict(
        words=["fit", "optimizer.lr=fast"],
        what="'fast': not a number",
        where="optimizer.lr",
        rule="learning rate at its highest",
        fix="optimizer.lr=0.0002",
    ),
    "bound": dict(
        words=["fit", "method.r=0"],
        what="should be greater than or equal to 1",
        where="method.r=0",
        rule="whole number >= 1: rank of the adapters",
        fix="method.r=16",
    ),
    "length of a list": dict(
        words=["fit", "optimizer.betas=[0.9]"],
        what="too few values",
        where="optimizer.betas",
        rule="2 numbers: decay of the two moments",
        fix="[0.9,0.999]",
    ),
    "choice": dict(
        words=["fit", "model.dtype=fp16"],
        what="fp16 overflows",
        where="model.dtype",
        rule="auto|fp32|bf16",
        fix="model.dtype=auto",
    ),
    "keys that contradict each other": dict(
        words=["fit", "method.r=3", "method.lora_init=orthogonal"],
        what="needs an even rank, r is 3: use method.r=4",
        where="method",
        rule="keys of method fit together",
        fix="`qtrain fit --help`",
    ),
    "a value for a section": dict(
        words=["fit", "run=[1]"],
        what="is a section",
        where="run=[1]",
        rule="a mapping of keys to values",
        fix="run.KEY=VALUE",
    ),
    "task": dict(
        words=["fit", "task=sound"],
        what="is unknown",
        where="task=sound",
        rule="what kind of model is trained",
        fix="language, vision",
    ),
    "method": dict(
        words=["fit", "method.name={a: 1}"],
        what="is unknown",
        where="method.name={'a': 1}",
        rule="method: qlora, qat",
        fix="peqa, ptq, qat, qlora",
    ),
    "argument of the trainer": dict(
        words=["fit", "trainer.max_step=3"],
        what="is no argument of lightning.Trainer",
        where="trainer.max_step",
        rule="by their names",
        fix="did you mean 'max_steps'?",
    ),
    "type of such an argument": dict(
        words=["fit", "trainer.max_steps=many"],
        what="many does not fit",
        where="trainer.max_steps",
        rule="max_steps: int",
        fix="leave trainer.max_steps out",
    ),
    "an owned argument": dict(
        words=["fit", "trainer.callbacks=[]"],
        what="is decided elsewhere",
        where="trainer.callbacks",
        rule="one owner",
        fix="the Python API",
    ),
    "word": dict(
        words=["fit", "demo"], what="is no override", where="'demo'", rule="section.key=value", fix="--help lists"
    ),
    "key with an empty part": dict(
        words=["fit", "run..name=x"], what="is no override", where="run..name", rule="section.key=value", fix="--help"
    ),
    "value that is no YAML": dict(
        words=["fit", "run.name=[x"],
        what="while parsing a flow sequence",
        where="run.name=[x",
        rule="the value in YAML",
        fix="run.name=\"'TEXT'\"",
    ),
    "words of a verb without any": dict(
        words=["recipes", "recipe=demo"],
        what="takes no arguments",
        where="qtrain recipes",
        rule="it reads no config",
        fix="qtrain recipes",
    ),
    "task of a verb": dict(
        words=["export", "task=vision"],
        what="does not serve task vision",
        where="qtrain export",
        rule="it serves: language",
        fix="for vision there is: fit",
    ),
    "recipe's name": dict(
        words=["fit", "recipe=qlora_lama"],
        what="is unknown",
        where="recipe=qlora_lama",
        rule="a .yaml file by its path",
        fix="did you mean 'qlora_llama'?",
    ),
    "recipe's path": dict(
        words=["fit", "recipe=./none.yaml"],
        what="is no file",
        where="recipe=./none.yaml",
        rule="a YAML mapping of sections",
        fix="`qtrain recipes`",
    ),
    "path of a recipe, too long": dict(
        words=["fit", f"recipe={'a/' * 3000}"],
        what="is no file",
        where="recipe=a/a/a",
        rule="a YAML mapping of sections",
        fix="`qtrain recipes`",
    ),
    "recipe that is a list": dict(
        words=SUBMIT,
        files={"r.yaml": "- run\n"},
        what="no mapping",
        where="r.yaml",
        rule="mapping",
        fix="RUN/config.yaml",
    ),
    "recipe that is a word": dict(
        words=SUBMIT,
        files={"r.yaml": "run\n"},
        what="no mapping",
        where="r.yaml",
        rule="mapping",
        fix="RUN/config.yaml",
    ),
    "recipe with a tab": dict(
        words=SUBMIT,
        files={"r.yaml": "run:\n\tname: x\n"},
        what="line 2",
        where="r.yaml",
        rule="a recipe is a YAML mapping",
        fix="`qtrain recipes` lists examples",
    ),
    "recipe that says a key twice": dict(
        words=SUBMIT,
        files={"r.yaml": "run: {name: a}\nrun: {name: b}\n"},
        what="duplicate key run",
        where="r.yaml",
        rule="a recipe is a YAML mapping",
        fix="`qtrain recipes` lists examples",
    ),
    "recipe that is no text": dict(
        words=SUBMIT,
        files={"r.yaml": b"\xff\xfe\x00\x01"},
        what="can't decode byte 0xff",
        where="r.yaml",
        rule="a recipe is a YAML mapping",
        fix="`qtrain recipes` lists examples",
    ),
    "reference to nothing": dict(
        words=SUBMIT,
        files={"r.yaml": "run: {name: '${nowhere}'}\n"},
        what="'nowhere' not found",
        where="r.yaml",
        rule="refers to a key that is set",
        fix="the value itself",
    ),
    "levels without end": dict(
        words=SUBMIT,
        files={"r.yaml": "run: " + "[" * 3000 + "]" * 3000},
        what="more than 50 levels",
        where="r.yaml",
        rule="at most 50 levels",
        fix="without the nesting",
    ),
    "no model": dict(
        words=["fit", "data.train=x.jsonl"],
        what="model.path is not set",
        where="model.path",
        rule="each run begins with a model",
        fix="model.path=HUB_ID",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_config(name: str, refused: Any) -> None:
    refused(**CASES[name])


def test_the_same_from_a_shell(tmp_path: Path) -> None:
    """The process itself: status, stderr, nothing on stdout."""
    for name in ("verb", "bound", "levels without end"):
        case = CASES[name]
        for file, content in case.get("files", {}).items():
            (tmp_path / file).write_text(content)
        found = subprocess.run(
            [sys.executable, "-m", "qtrain", *case["words"]], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr.startswith("error ") and "Traceback" not in found.stderr
        assert case["what"] in found.stderr and "  try:  " in found.stderr
