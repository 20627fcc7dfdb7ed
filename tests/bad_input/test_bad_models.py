"""Models that are none, or not whole: configurations, weights, tokenizers, GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = ["validate", "model.path=model", "data.validation=text.txt"]
FILES = {"text.txt": "the dog sleeps on\n" * 20}
WHOLE = "every parameter is in the files"
Change = Callable[[Path], object]


def config(**keys: Any) -> Change:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def content(name: str, text: str | bytes) -> Change:
    return lambda model: (model / name).write_bytes(text.encode() if isinstance(text, str) else text)


def weights(change_of: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change_of(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


CASES: dict[str, dict[str, Any]] = {
    "no config": dict(
        model=lambda model: (model / "config.json").unlink(),
        what="has no config.json",
        where="model.path=model",
        rule="a model directory holds config.json",
        fix="the directory that does",
    ),
    "no weights": dict(
        model=lambda model: (model / "model.safetensors").unlink(),
        what="has no *.safetensors",
        where="model.path=model",
        rule="safetensors alone",
        fix="download it again",
    ),
    "a file that is no model": dict(
        words=["validate", "model.path=model/config.json", "data.validation=text.txt"],
        model=lambda model: None,
        what="is a .json file",
        where="model.path=model/config.json",
        rule="a model is a directory",
        fix="model.path=model",
    ),
    "a path to nothing": dict(
        words=["validate", "model.path=./modle", "data.validation=text.txt"],
        model=lambda model: None,
        what="does not exist",
        where="model.path=./modle",
        rule="a hub id (ORG/NAME)",
        fix="did you mean 'model'?",
    ),
    "a path that no file can have": dict(
        words=["validate", f"model.path={'m' * 300}", "data.validation=text.txt"],
        what="File name too long",
        where="model.path=mmm",
        rule="a .gguf file",
        fix="check the path",
    ),
    "config that is no JSON": dict(
        model=content("config.json", "{"),
        what="it cannot be read: Expecting property name",
        where="model/config.json",
        rule="a JSON object",
        fix="download the file again",
    ),
    "config that is a list": dict(
        model=content("config.json", "[1]"),
        what="it holds no object",
        where="model/config.json",
        rule="a JSON object",
        fix="download the file again",
    ),
    "architecture": dict(
        model=config(model_type="nothing_of_the_kind"),
        what="`nothing_of_the_kind`",
        where="model/config.json",
        rule="an architecture that transformers knows",
        fix="a newer transformers",
    ),
    "size that is a word": dict(
        model=config(hidden_size="x"),
        what="Field 'hidden_size' expected int, got str",
        where="model/config.json",
        rule="in sizes that fit together",
        fix="download the file again",
    ),
    "sizes that do not divide": dict(
        model=config(num_attention_heads=7),
        what="not a multiple of the number of attention heads (7)",
        where="model/config.json",
        rule="in sizes that fit together",
        fix="download the file again",
    ),
    "size of another model": dict(
        model=config(vocab_size=100),
        what="lm_head.weight of shape [512, 64]",
        where="model/model.safetensors",
        rule="config.json makes it [100, 64]",
        fix="check the sizes in config.json",
    ),
    "a size without end": dict(
        model=config(intermediate_size=10**9),
        what="down_proj.weight of shape [64, 128]",
        where="model/model.safetensors",
        rule="config.json makes it [64, 1000000000]",
        fix="check the sizes in config.json",
    ),
    "layers without end": dict(
        model=config(num_hidden_layers=10**9),
        what="num_hidden_layers=1,000,000,000, and 21 tensors are there",
        where="model/config.json",
        rule="a layer has tensors of its own",
        fix="download the directory again",
    ),
    "layers that are not there": dict(
        model=config(num_hidden_layers=4),
        what="model.layers.2.input_layernorm.weight is missing, and 17 more",
        where="model",
        rule=WHOLE,
        fix="check the sizes in config.json",
    ),
    "a tensor that is not there": dict(
        model=weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        what="model.layers.1.mlp.up_proj.weight is missing",
        where="model",
        rule=WHOLE,
        fix="download it again",
    ),
    "weights that are cut": dict(
        model=lambda model: (path := model / "model.safetensors").write_bytes(path.read_bytes()[:-100]),
        what="file not fully covered",
        where="model/model.safetensors",
        rule="a header that describes the bytes after it",
        fix="download the file again",
    ),
    "NaN in the weights": dict(
        model=weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
        what="loss is nan",
        where="validate.json",
        rule="figures are finite numbers",
        fix="look for NaN or inf in the weights of model.path",
    ),
    "tokenizer that is no JSON": dict(
        model=content("tokenizer.json", "{"),
        what="tokenizer of model cannot be loaded",
        where="model",
        rule="a model is config.json, safetensors and a tokenizer",
        fix="download it again",
    ),
    "configuration of a tokenizer that is a list": dict(
        model=content("tokenizer_config.json", "[]"),
        what="tokenizer of model cannot be loaded: AttributeError",
        where="model",
        rule="a model is config.json, safetensors and a tokenizer",
        fix="download it again",
    ),
    "attention": dict(
        words=[*WORDS, "model.attention=nope"],
        model=lambda model: None,
        what='`attn_implementation="nope"` is not supported',
        where="model of model",
        rule="that transformers loads",
        fix="config.json",
    ),
    "shard of an index": dict(
        model=lambda model: (
            (model / "model.safetensors").unlink(),
            (model / "a.safetensors").write_bytes(b""),
            (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        ),
        what="it is no index of shards: TypeError",
        where="model.safetensors.index.json",
        rule="weight_map: the name of each tensor to that of its file",
        fix="download the directory again",
    ),
    "GGUF that is none": dict(
        words=["validate", "model.path=m.gguf", "data.validation=text.txt"],
        files=FILES | {"m.gguf": b"GGML" + bytes(60)},
        what="it begins with b'GGML'",
        where="m.gguf",
        rule="GGUF 2 and 3",
        fix="download the file again",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_model(name: str, refused: Callable[..., str]) -> None:
    refused(**{"words": WORDS, "files": FILES} | CASES[name])
