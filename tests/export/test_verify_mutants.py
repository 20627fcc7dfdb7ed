"""Broken exports: whatever is changed in one is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.export.config import FORMATS
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.check import check_export
from qtrain.export.verify.verdict import Verdict
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.modules.deployed import DeployedModel
from qtrain.numerics.packing import pack, unpack
from qtrain.registry import resolve

UP = "model.layers.1.mlp.up_proj"
INDEX = "model.safetensors.index.json"
QAT = {"name": "qat", "weight": {"format": "int4", "group_size": 32, "range": "learned"}}
W8A8 = {
    "name": "qat",
    "weight": {"format": "int8"},
    "activation": {"format": "int8", "convention": "compressed-tensors"},
}
PEQA = {"name": "peqa", "init": "rtn", "weight": {"format": "int3", "group_size": 32, "symmetric": False}}
ASYMMETRIC = {"name": "qat", "weight": {"format": "int4", "group_size": 32, "symmetric": False, "range": "learned"}}
FP8 = {"name": "qat", "weight": {"format": "fp8_e4m3"}, "activation": {"format": "fp8_e4m3"}}


@dataclass
class Made:
    """An export with the model that it was written from; the methods change the export."""

    format: str
    directory: Path
    deployed: DeployedModel
    tokenizer: PreTrainedTokenizerFast

    def verdict(self) -> Verdict:
        return check_export(ExportLocation(self.format, self.directory, {}), self.deployed, self.tokenizer)

    def copy(self, directory: Path) -> Made:
        shutil.copytree(self.directory, directory)
        return Made(self.format, directory, self.deployed, self.tokenizer)

    def file_of(self, tensor: str) -> Path:
        index = self.directory / INDEX
        name = json.loads(index.read_text())["weight_map"][tensor] if index.exists() else "model.safetensors"
        return self.directory / str(name)

    def tensor(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change one tensor and leave everything else as it is."""
        file = self.file_of(name)
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file, metadata=metadata)

    def json(self, file: str, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.directory / file).read_text(encoding="utf-8"))
        change(content)
        (self.directory / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        self.json("config.json", lambda config: change(config["quantization_config"]))

    def weights(self, change: Callable[[dict[str, Any]], object]) -> None:
        self.header(lambda header: [change(group["weights"]) for group in header["config_groups"].values()])


def make(model: PreTrainedModel, trained: dict[str, Any], out: Path, tokenizer: Any, layout: str) -> Made:
    section = METHODS.get(trained["name"]).model_validate(trained)
    method = build_method(section)
    prepared = method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
    deployed = method.deployed(prepared, dtype=torch.float32)
    options = FORMATS.get(layout).model_validate({"format": layout, "max_shard_size": "100KB"})
    resolve(options.implementation)(deployed, options, out, tokenizer=tokenizer, facts={})
    return Made(layout, out, deployed, tokenizer)


KINDS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "qat": (QAT, "compressed-tensors", False),
    "tied": (QAT, "compressed-tensors", True),
    "w8a8": (W8A8, "compressed-tensors", False),
    "peqa": (PEQA, "compressed-tensors", False),
    "merged": (QAT, "merged", False),
    "gptq": (QAT, "gptq", False),
    "gptq v2": (PEQA, "gptq", False),
    "awq": (ASYMMETRIC, "awq", False),
    "torchao": (QAT, "torchao", False),
    "torchao fp8": (FP8, "torchao", False),
    "gguf": (QAT, "gguf", False),
}


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            options, layout, tied = KINDS[kind]
            model = tiny_model(initializer_range=0.1, tie_word_embeddings=tied, attention_bias=True)
            made[kind] = make(model, options, tmp_path_factory.mktemp("good") / kind, tiny_tokenizer, layout)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_export_passes(good: Callable[[str], Made], kind: str) -> None:
    made = good(kind)
    assert kind == "gguf" or len(list(made.directory.glob("*.safetensors"))) > 1
    verdict = made.verdict()
    assert verdict.passed and not verdict.lossy, [str(failure) for failure in verdict.failures]
    assert set(verdict.cells.values()) <= {"ok", "0", "-"}
    if kind == "gguf":
        assert verdict.cells["codes"] == "0"
        return
    counts = verdict.figures["counts"]
    assert all(count["differing"] == 0 for count in counts.values())
    if kind != "merged":
        assert counts["codes"]["compared"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert bool(counts["zero points"]["compared"]) == (kind in ("peqa", "gptq", "gptq v2", "awq"))


# Files


def truncate(made: Made) -> None:
    path = made.file_of(PACKED)
    path.write_bytes(path.read_bytes()[:-64])


def remove_shard(made: Made) -> None:
    made.file_of(PACKED).unlink()


def point_elsewhere(made: Made) -> None:
    def change(index: dict[str, Any]) -> None:
        wrong = next(file for file in index["weight_map"].values() if file != index["weight_map"][f"{UP}.weight_scale"])
        index["weight_map"][f"{UP}.weight_scale"] = wrong

    made.json(INDEX, change)


def forget_in_index(made: Made) -> None:
    made.json(INDEX, lambda index: index["weight_map"].pop(f"{UP}.weight_scale"))


def promise_too_much(made: Made) -> None:
    made.json(
        INDEX, lambda index: index["weight_map"].update({"model.gone.weight": "model-00001-of-00004.safetensors"})
    )


def leave_a_file(made: Made) -> None:
    save_file({"model.stray.weight": torch.ones(2)}, made.directory / "old.safetensors")


def remove_index(made: Made) -> None:
    (made.directory / INDEX).unlink()


# Names


def add_tensor(made: Made, name: str = "model.layers.2.mlp.up_proj.weight", value: Tensor | None = None) -> None:
    file = made.file_of("model.norm.weight")
    save_file(load_file(file) | {name: torch.ones(4) if value is None else value}, file, metadata={"format": "pt"})
    made.json(INDEX, lambda index: index["weight_map"].update({name: file.name}))


def drop_tensor(made: Made, name: str = "model.norm.weight") -> None:
    file = made.file_of(name)
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    made.json(INDEX, lambda index: index["weight_map"].pop(name))


def add_points(made: Made) -> None:
    add_tensor(made, f"{UP}.weight_zero_point", torch.zeros(16, 2, dtype=torch.int32))


# Codes, scales, zero points


def flip_a_bit(words: Tensor) -> Tensor:
    raw = words.view(torch.uint8)
    raw[7, 5] ^= 4
    return words


def swap_nibbles(words: Tensor) -> Tensor:
    raw = words.view(torch.uint8)
    return (raw >> 4 | raw << 4).view(torch.int32)


def other_sign(codes: Tensor) -> Tensor:
    codes.view(torch.uint8)[7, 5] ^= 128
    return codes


def no_number(codes: Tensor) -> Tensor:
    codes.view(torch.uint8)[7, 5] = 127
    return codes


def described(**changes: Any) -> Callable[[Made], None]:
    """Other words in the metadata of one of torchao's tensors."""

    def change(made: Made) -> None:
        file = made.file_of(f"{UP}._weight_qdata")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        content = json.loads(metadata[f"{UP}.weight"])
        content["_data"].update(changes)
        save_file(load_file(file), file, metadata={**metadata, f"{UP}.weight": json.dumps(content)})

    return change


def double_one(scale: Tensor) -> Tensor:
    scale[9, 1] *= 2
    return scale


def points_of(change: Callable[[Tensor], Tensor], bits: int = 3, rows: int = 128) -> Callable[[Tensor], Tensor]:
    def changed(words: Tensor) -> Tensor:
        points = unpack(words.t(), bits, rows).t()
        return pack(change(points).t().contiguous(), bits).t().contiguous()

    return changed


def off_by_one(points: Tensor) -> Tensor:
    return torch.where(points < 3, points + 1, points)


def transposed(points: Tensor) -> Tensor:
    """As a writer leaves them that takes [groups, out] for [out, groups]."""
    return points.t().reshape(points.shape)


# Everything else


def next_float(value: Tensor) -> Tensor:
    """The smallest change that there is, in one number."""
    flat = value.flatten()
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
    return flat.view(value.shape)


def scramble_row(table: Tensor) -> Tensor:
    table[7] = table[8]
    return table


def untie(made: Made) -> None:
    made.json("config.json", lambda config: config.update(tie_word_embeddings=False))


def other_head(made: Made) -> None:
    add_tensor(made, "lm_head.weight", torch.randn(512, 64))


def other_theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = 500000.0


def swap_words(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, other = "a", "b"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def drop_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def other_template(made: Made) -> None:
    path = made.directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "bot"))


def header(**changes: Any) -> Callable[[Made], None]:
    """What both files of GPTQ's header say."""

    def change(made: Made) -> None:
        made.header(lambda content: content.update(changes))
        if (made.directory / "quantize_config.json").exists():
            made.json("quantize_config.json", lambda content: content.update(changes))

    return change


def permute(order: Tensor) -> Tensor:
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]


def one_more(words: Tensor) -> Tensor:
    """A zero point of v1 where v2 has its own, in the first field of each word."""
    return words + 1


def in_file(name: str, at: int) -> Callable[[Made], None]:
    """Another byte in a tensor of a .gguf file."""

    def change(made: Made) -> None:
        found = next(it for it in GGUFReader(made.directory / "model.gguf", "r+").tensors if it.name == name)
        found.data.view(np.uint8).reshape(-1)[at] ^= 1

    return change


def key_of_file(made: Made) -> None:
    GGUFReader(made.directory / "model.gguf", "r+").fields["llama.attention.head_count_kv"].parts[-1][0] = 4


def cut_file(made: Made) -> None:
    path = made.directory / "model.gguf"
    path.write_bytes(path.read_bytes()[:-4096])


def ignore(*more: str) -> Callable[[Made], None]:
    return lambda made: made.header(lambda header: header.update(ignore=list(more)))


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Made], None]:
    return lambda made: made.tensor(name, change)


def weights(**changes: Any) -> Callable[[Made], None]:
    return lambda made: made.weights(lambda scheme: scheme.update(changes))


def inputs(**changes: Any) -> Callable[[Made], None]:
    def change(header: dict[str, Any]) -> None:
        for group in header["config_groups"].values():
            group["input_activations"] = {**(group["input_activations"] or {}), **changes}

    return lambda made: made.header(change)


def config(**changes: Any) -> Callable[[Made], None]:
    return lambda made: made.json("config.json", lambda content: content.update(changes))


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
PACKED, SCALE, POINTS = f"{UP}.weight_packed", f"{UP}.weight_scale", f"{UP}.weight_zero_point"
QWEIGHT, QZEROS, G_IDX = (f"{UP}.{part}" for part in ("qweight", "qzeros", "g_idx"))
Mutant = tuple[str, Callable[[Made], None], str, list[str]]
"""Kind of export, the change, the row of the table that fails, and words of the message."""
MUTANTS: dict[str, Mutant] = {
    "truncated shard": ("qat", truncate, "files", [".safetensors: it cannot be read"]),
    "missing shard": ("qat", remove_shard, "files", [INDEX, PACKED, "lies in no file"]),
    "index names another file": ("qat", point_elsewhere, "files", [INDEX, SCALE, "and lies in"]),
    "index forgets a tensor": ("qat", forget_in_index, "files", [INDEX, SCALE, "is not in it"]),
    "index promises a tensor": ("qat", promise_too_much, "files", [INDEX, "model.gone.weight", "in no file"]),
    "file that no index names": ("qat", leave_a_file, "files", [INDEX, "old.safetensors is not in it"]),
    "no index": ("qat", remove_index, "files", ["files and no index"]),
    "extra tensor": ("qat", add_tensor, "names", ["model.layers.2.mlp.up_proj.weight: no tensor of the model"]),
    "extra part of a layer": ("qat", add_points, "names", [f"{UP}.weight_zero_point: no tensor of the model"]),
    "missing norm": ("qat", drop_tensor, "names", ["model.norm.weight: it is missing"]),
    "missing scale": ("qat", lambda made: drop_tensor(made, SCALE), "layout", [SCALE, "missing"]),
    "flipped bit": ("qat", tensor(PACKED, flip_a_bit), "codes", [f"{UP}: 1 of 73,728 codes differ", "[7, 10]"]),
    "swapped nibbles": ("qat", tensor(PACKED, swap_nibbles), "codes", [f"{UP}: ", "codes differ, first at [0, 0]"]),
    "rows swapped": ("qat", tensor(PACKED, lambda words: words.flip(0)), "codes", [UP, "codes differ"]),
    "changed byte": ("w8a8", tensor(f"{UP}.weight", lambda codes: codes ^ 1), "codes", [UP, "8,192 of 73,728 codes"]),
    "code of a 3-bit word": ("peqa", tensor(PACKED, flip_a_bit), "codes", [UP, "1 of 73,728 codes"]),
    "one scale doubled": ("qat", tensor(SCALE, double_one), "scales", [f"{UP}: 1 of 2,304 scales differ", "[9, 1]"]),
    "scales a group on": ("qat", tensor(SCALE, lambda s: s.roll(1, 1)), "scales", [UP, "256 of 2,304 scales"]),
    "infinite scale": ("qat", tensor(SCALE, lambda s: s * torch.inf), "layout", [SCALE, "NaN or inf"]),
    "scales of another shape": ("qat", tensor(SCALE, lambda s: s[:, :1]), "layout", [SCALE, "[128, 1]", "[128, 2]"]),
    "zero points off by one": (
        "peqa",
        tensor(POINTS, points_of(off_by_one)),
        "zero points",
        [UP, "zero points differ"],
    ),
    "zero points transposed": (
        "peqa",
        tensor(POINTS, points_of(transposed)),
        "zero points",
        [UP, "zero points differ"],
    ),
    "norm": ("qat", tensor("model.norm.weight", next_float), "tensors", ["model.norm.weight: 1 of 64 numbers differ"]),
    "bias": (
        "qat",
        tensor("model.layers.0.self_attn.q_proj.bias", next_float),
        "tensors",
        ["model.layers.0.self_attn.q_proj.bias: 1 of 64 numbers"],
    ),
    "minus zero": (
        "qat",
        tensor("model.layers.0.self_attn.q_proj.bias", torch.neg),
        "tensors",
        ["model.layers.0.self_attn.q_proj.bias: 64 of 64 numbers"],
    ),
    "embedding row": ("qat", tensor("model.embed_tokens.weight", scramble_row), "tensors", ["embed_tokens", "[7, 0]"]),
    "head": ("qat", tensor("lm_head.weight", next_float), "tensors", ["lm_head.weight: 1 of 32,768"]),
    "norm in bf16": (
        "qat",
        tensor("model.norm.weight", lambda norm: norm.bfloat16()),
        "tensors",
        ["model.norm.weight: torch.bfloat16 there"],
    ),
    "merged weight": ("merged", tensor(f"{UP}.weight", next_float), "tensors", [f"{UP}.weight: 1 of 8,192 numbers"]),
    "head untied": ("tied", untie, "config", ["tie_word_embeddings is False there, True in the run"]),
    "head beside a tied one": ("tied", other_head, "names", ["lm_head.weight: no tensor of the model"]),
    "rope_theta": ("qat", lambda made: made.json("config.json", other_theta), "config", ["rope_theta is 500000.0"]),
    "key-value heads": ("qat", config(num_key_value_heads=4), "config", ["num_key_value_heads is 4 there, 2 in"]),
    "epsilon": ("qat", config(rms_norm_eps=1e-5), "config", ["rms_norm_eps is 1e-05 there, 1e-06 in the run"]),
    "architectures": ("qat", config(architectures=None), "config", ["architectures is empty"]),
    "dtype": ("qat", config(dtype="bfloat16"), "config", ["dtype is 'bfloat16' there, 'float32'"]),
    "no config": ("merged", lambda made: (made.directory / "config.json").unlink(), "config", ["config.json", "read"]),
    "bits": ("qat", weights(num_bits=8), "layout", ["weight_packed of shape", "in 8 bits"]),
    "bits of bytes": ("w8a8", weights(num_bits=7), "layout", ["7 bits hold -64 .. 63"]),
    "fewer bits of bytes": ("w8a8", inputs(num_bits=4), "layout", ["inputs int4 per_token there, int8 per_token in"]),
    "group_size": ("qat", weights(group_size=16), "layout", ["weight_scale of shape", "group of 16"]),
    "called asymmetric": ("qat", weights(symmetric=False), "layout", ["weight_zero_point is missing"]),
    "called symmetric": ("peqa", weights(symmetric=True), "names", ["weight_zero_point: no tensor of the model"]),
    "inputs quantized": ("qat", inputs(**DYNAMIC), "layout", ["inputs int8 per_token there, unquantized in the run"]),
    "nothing ignored": ("qat", ignore(), "layout", ["lm_head: quantization_config takes it for quantized"]),
    "layer ignored": ("qat", ignore("lm_head", UP), "layout", [f"{UP}: quantization_config takes it for unquantized"]),
    "status": (
        "qat",
        lambda made: made.header(lambda header: header.update(quantization_status="frozen")),
        "layout",
        ["quantization_status='frozen'"],
    ),
    "quantized cache": (
        "qat",
        lambda made: made.header(lambda header: header.update(kv_cache_scheme={"num_bits": 8})),
        "layout",
        ["quantization_config.kv_cache_scheme={'num_bits': 8}"],
    ),
    "no scale of its own": ("qat", weights(strategy="channel", group_size=None), "layout", ["weight_scale of shape"]),
    "method": (
        "qat",
        lambda made: made.header(lambda header: header.update(quant_method="gptq")),
        "layout",
        ["quant_method='gptq'"],
    ),
    "merged called quantized": ("merged", config(quantization_config={"quant_method": "gptq"}), "layout", ["'gptq'"]),
    "gptq: permuted g_idx": ("gptq", tensor(G_IDX, permute), "layout", [G_IDX, "act-order"]),
    "gptq: groups shifted by one": ("gptq", tensor(G_IDX, lambda order: order.roll(1)), "layout", [G_IDX, "act-order"]),
    "gptq: flipped bit": ("gptq", tensor(QWEIGHT, flip_a_bit), "codes", [f"{UP}: 1 of 73,728 codes"]),
    "gptq: words along the other side": (
        "gptq",
        tensor(QWEIGHT, lambda words: words.t().reshape(words.shape)),
        "codes",
        [UP, "codes differ"],
    ),
    "gptq: scale": ("gptq", tensor(f"{UP}.scales", lambda s: s.flip(0)), "scales", [UP, "scales differ"]),
    "gptq: zero point": ("gptq v2", tensor(QZEROS, one_more), "zero points", [f"{UP}: ", "zero points differ"]),
    "gptq: v1 called v2": ("gptq", header(checkpoint_format="gptq_v2"), "zero points", ["2,304 of 2,304 zero points"]),
    "gptq: v2 called v1": ("gptq v2", header(checkpoint_format="gptq"), "layout", ["asymmetric 3-bit", "v1"]),
    "gptq: act-order": ("gptq", header(desc_act=True), "layout", ["quantization_config.desc_act=True"]),
    "gptq: symmetric": ("gptq", header(sym=False), "layout", ["called asymmetric there, symmetric in the run"]),
    "gptq: bits": ("gptq", header(bits=8), "layout", ["qweight of shape", "in 8 bits"]),
    "gptq: group_size": ("gptq", header(group_size=64), "layout", ["qzeros of shape", "group_size=64"]),
    "gptq: head": ("gptq", header(lm_head=True), "layout", ["lm_head: quantization_config takes it for quantized"]),
    "gptq: layer left out": (
        "gptq",
        header(dynamic={"-:.*up_proj": {}}),
        "layout",
        [f"{UP}: quantization_config takes it for unquantized"],
    ),
    "gptq: two headers": (
        "gptq",
        lambda made: made.json("quantize_config.json", lambda content: content.update(bits=8)),
        "layout",
        ["quantize_config.json: it differs"],
    ),
    "awq: order of nibbles": ("awq", tensor(QWEIGHT, swap_nibbles), "codes", [UP, "codes differ"]),
    "awq: zero points": ("awq", tensor(QZEROS, lambda words: words.flip(1)), "zero points", [UP, "zero points differ"]),
    "awq: version": ("awq", header(version="gemv"), "layout", ["quantization_config.version='gemv'"]),
    "awq: group_size": ("awq", header(group_size=64), "layout", ["qzeros of shape", "group_size=64"]),
    "awq: head": ("awq", header(modules_to_not_convert=None), "layout", ["lm_head: quantization_config takes it for"]),
    "torchao: code": ("torchao", tensor(f"{UP}._weight_qdata", lambda codes: codes.neg()), "codes", [UP, "codes"]),
    "torchao: zero points": (
        "torchao",
        tensor(f"{UP}._weight_zero_point", lambda points: points + 1),
        "zero points",
        [f"{UP}: 256 of 256 zero points differ"],
    ),
    "fp8: a bit": ("torchao fp8", tensor(f"{UP}._weight_qdata", other_sign), "codes", [UP, "1 of ", "codes differ"]),
    "fp8: NaN": ("torchao fp8", tensor(f"{UP}._weight_qdata", no_number), "layout", [UP, "NaN among the codes"]),
    "fp8: scale": ("torchao fp8", tensor(f"{UP}._weight_scale", next_float), "scales", [UP, "1 of ", "scales differ"]),
    "fp8: block": ("torchao fp8", described(block_size=[1, 32]), "layout", [UP, "block_size=[1, 32]", "[1, 64]"]),
    "fp8: inputs": ("torchao fp8", described(act_quant_kwargs=None), "layout", [UP, "inputs unquantized there"]),
    "fp8: bound": (
        "torchao fp8",
        described(act_quant_kwargs={"_data": {"hp_value_ub": 6.0}}),
        "layout",
        [UP, "inputs by token are read"],
    ),
    "fp8: product": ("torchao fp8", described(mm_config=None), "layout", [UP, "mm_config=None"]),
    "torchao: head": ("torchao", header(include_input_output_embeddings=True), "layout", ["include_input_output"]),
    "gguf: byte of codes": ("gguf", in_file("blk.1.ffn_up.weight", 5), "codes", [f"{UP}.weight: 1 of 8,192 weights"]),
    "gguf: byte of a scale": ("gguf", in_file("blk.1.ffn_up.weight", 0), "codes", [f"{UP}.weight: 32 of 8,192"]),
    "gguf: norm": ("gguf", in_file("output_norm.weight", 9), "tensors", ["model.norm.weight: 1 of 64 numbers differ"]),
    "gguf: embedding": ("gguf", in_file("token_embd.weight", 400), "tensors", ["embed_tokens.weight: 1 of 32,768"]),
    "gguf: heads": ("gguf", key_of_file, "config", ["head_count_kv: '4' there, '2' in the run"]),
    "gguf: cut": ("gguf", cut_file, "files", ["no whole GGUF file"]),
    "generation config": (
        "qat",
        lambda made: made.json("generation_config.json", lambda content: content.update(eos_token_id=7)),
        "config",
        ["generation_config.json: eos_token_id is 7"],
    ),
    "two words swapped": (
        "qat",
        lambda made: made.json("tokenizer.json", swap_words),
        "tokenizer",
        ["a probe text has other tokens"],
    ),
    "a merge less": ("qat", lambda made: made.json("tokenizer.json", drop_merge), "tokenizer", ["other merges"]),
    "chat template": ("qat", other_template, "tokenizer", ["it has another chat template"]),
    "end of text": (
        "qat",
        lambda made: made.json("tokenizer_config.json", lambda content: content.update(eos_token="<pad>")),
        "tokenizer",
        ["eos_token is '<pad>' there, '<|im_end|>' in the run"],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_and_named(good: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    kind, mutate, row, words = MUTANTS[name]
    mutant = good(kind).copy(tmp_path / "mutant")
    mutate(mutant)
    verdict = mutant.verdict()
    assert not verdict.passed and verdict.cells[row] not in ("ok", "0", "-")
    assert any(all(word in str(failure) for word in words) for failure in verdict.failures), [
        *map(str, verdict.failures)
    ]
    for failure in verdict.failures:
        assert failure.what and failure.where
    assert all("try:" in str(failure) for failure in verdict.failures_with("qtrain export"))


def test_there_are_mutants_of_every_part() -> None:
    assert {row for _, _, row, _ in MUTANTS.values()} == {
        *("files", "names", "layout", "codes", "scales", "zero points", "tensors", "config", "tokenizer")
    }
