"""Broken bitsandbytes exports: whatever is changed in base, adapter or header is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtrain.export.bitsandbytes.config import BitsAndBytesOptions
from qtrain.export.bitsandbytes.write import write
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.check import check_export
from qtrain.export.verify.verdict import Verdict
from qtrain.methods.method import build_method
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.modules.deployed import DeployedModel

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

UP = "model.layers.1.mlp.up_proj"
WEIGHT, ABSMAX, STATE = f"{UP}.weight", f"{UP}.weight.absmax", f"{UP}.weight.quant_state.bitsandbytes__nf4"
NESTED = f"{UP}.weight.nested_absmax"
B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
INDEX = "model.safetensors.index.json"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"base": "nf4"},
    "fp4": {"base": "fp4", "double_quant": False},
    "int8": {"base": "int8"},
    "merged": {"base": "nf4"},
}


@dataclass
class Made:
    """An export with the model that it was written from; the methods change the export."""

    directory: Path
    facts: dict[str, Any]
    deployed: DeployedModel
    tokenizer: PreTrainedTokenizerFast

    def verdict(self, facts: dict[str, Any] | None = None) -> Verdict:
        location = ExportLocation("bitsandbytes", self.directory, self.facts if facts is None else facts)
        return check_export(location, self.deployed, self.tokenizer)

    def copy(self, directory: Path) -> Made:
        shutil.copytree(self.directory, directory)
        return Made(directory, self.facts, self.deployed, self.tokenizer)

    def file_of(self, tensor: str) -> Path:
        if tensor == B:
            return self.directory / "adapter" / "adapter_model.safetensors"
        return self.directory / str(json.loads((self.directory / INDEX).read_text())["weight_map"][tensor])

    def tensors(self, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change one file's tensors, and the index with them."""
        file = self.file_of(name)
        tensors = load_file(file)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
        if name == B:
            return
        index = json.loads((self.directory / INDEX).read_text())
        kept = {key: where for key, where in index["weight_map"].items() if where != file.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
        (self.directory / INDEX).write_text(json.dumps(index))

    def json(self, file: str, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.directory / file).read_text(encoding="utf-8"))
        change(content)
        (self.directory / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            method = build_method(QLoraOptions(r=4, **KINDS[kind]))
            model = method.prepare(
                tiny_model(initializer_range=0.1, tie_word_embeddings=False, attention_bias=True),
                compute_dtype=torch.float32,
                device=torch.device("cpu"),
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            deployed = method.deployed(model, dtype=torch.float32)
            again = {"quantize": "nf4", "allow_requantize": True} if kind == "merged" else {}
            options = BitsAndBytesOptions.model_validate({"max_shard_size": "60KB", **again})
            out = tmp_path_factory.mktemp("good") / kind
            facts = write(deployed, options, out, tokenizer=tiny_tokenizer, facts={})
            made[kind] = Made(out, facts, deployed, tiny_tokenizer)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False])
def test_a_good_export_passes(good: Callable[[str], Made], kind: str, known: bool) -> None:
    made = good(kind)
    assert len(list(made.directory.glob("*.safetensors"))) > 1
    verdict = made.verdict(None if known else {})
    assert verdict.passed and verdict.lossy == verdict.merged == (kind == "merged"), [*map(str, verdict.failures)]
    assert set(verdict.cells.values()) <= {"ok", "0", "lossy"}
    assert ("adapter" in verdict.cells) == (kind != "merged")


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Made], None]:
    return lambda made: made.tensors(name, lambda tensors: tensors.update({name: change(tensors[name])}))


def gone(name: str) -> Callable[[Made], None]:
    return lambda made: made.tensors(name, lambda tensors: tensors.pop(name))


def beside(name: str, new: str, value: Tensor) -> Callable[[Made], None]:
    return lambda made: made.tensors(name, lambda tensors: tensors.update({new: value}))


def words(**changes: Any) -> Callable[[Made], None]:
    """Other words in the JSON among a layer's tensors."""

    def changed(stored: Tensor) -> Tensor:
        content = json.loads(bytes(stored.tolist())) | changes
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return tensor(STATE, changed)


def header(**changes: Any) -> Callable[[Made], None]:
    return lambda made: made.json("config.json", lambda config: config["quantization_config"].update(changes))


def flip_a_bit(codes: Tensor) -> Tensor:
    codes.view(torch.uint8)[700] ^= 4
    return codes


def swap_nibbles(codes: Tensor) -> Tensor:
    return codes >> 4 | codes << 4


def next_float(value: Tensor) -> Tensor:
    flat = value.flatten()
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
    return flat.view(value.shape)


def one_more(value: Tensor) -> Tensor:
    value.flatten()[5] += 1
    return value


def cut(made: Made) -> None:
    path = made.file_of(WEIGHT)
    path.write_bytes(path.read_bytes()[:-64])


def cut_adapter(made: Made) -> None:
    path = made.file_of(B)
    path.write_bytes(path.read_bytes()[:-64])


def no_adapter(made: Made) -> None:
    shutil.rmtree(made.directory / "adapter")


def repacked(made: Made) -> None:
    """As a CPU with AVX512-BF16 leaves the scales of blocks, had it evaluated the model before it was written."""
    made.tensors(NESTED, lambda tensors: tensors.update({NESTED: tensors[NESTED].bfloat16().float()}))


Mutant = tuple[str, Callable[[Made], None], str, list[str]]
MUTANTS: dict[str, Mutant] = {
    "truncated shard": ("nf4", cut, "files", ["cannot be read"]),
    "flipped bit": ("nf4", tensor(WEIGHT, flip_a_bit), "codes", [f"{UP}: 1 of 73,728 codes differ, first at [21, 57]"]),
    "swapped nibbles": ("nf4", tensor(WEIGHT, swap_nibbles), "codes", [UP, "codes differ, first at [0, 0]"]),
    "codes of fp4": ("fp4", tensor(WEIGHT, flip_a_bit), "codes", [f"{UP}: 1 of 73,728 codes differ"]),
    "byte of int8": ("int8", tensor(WEIGHT, lambda codes: codes ^ 1), "codes", [UP, "8,192 of 73,728 codes"]),
    "rows swapped": ("int8", tensor(WEIGHT, lambda codes: codes.flip(0)), "codes", [UP, "codes differ"]),
    "absmax in 8 bits": ("nf4", tensor(ABSMAX, one_more), "scales", [f"{ABSMAX}: 1 of ", "scales differ"]),
    "absmax": ("fp4", tensor(ABSMAX, next_float), "scales", [f"{ABSMAX}: 1 of ", "scales differ"]),
    "absmax a block on": ("fp4", tensor(ABSMAX, lambda scales: scales.roll(1)), "scales", [ABSMAX, "scales differ"]),
    "nested absmax in bf16": ("nf4", repacked, "scales", [NESTED, "scales differ"]),
    "nested offset": ("nf4", words(nested_offset=0.0), "scales", [f"{UP}: nested_offset", "scales differ"]),
    "SCB": ("int8", tensor(f"{UP}.SCB", lambda scales: scales / 127), "scales", [f"{UP}.SCB", "128 of "]),
    "quant_map": ("nf4", tensor(f"{WEIGHT}.quant_map", lambda table: -table), "layout", [f"{WEIGHT}.quant_map"]),
    "nested quant_map": (
        "nf4",
        tensor(f"{WEIGHT}.nested_quant_map", next_float),
        "layout",
        [f"{WEIGHT}.nested_quant_map: it differs"],
    ),
    "blocksize": ("nf4", words(blocksize=128), "layout", [f"{UP}: quant_state.blocksize is 128 there, 64 in the run"]),
    "nested blocksize": ("nf4", words(nested_blocksize=128), "layout", ["quant_state.nested_blocksize is 128"]),
    "shape": ("nf4", words(shape=[64, 128]), "layout", [f"{UP}: quant_state.shape is [64, 128]"]),
    "kind": ("nf4", words(quant_type="fp4"), "layout", ["quant_state.quant_type is 'fp4' there, 'nf4' in the run"]),
    "dtype of dequantized weights": ("nf4", words(dtype="float16"), "layout", ["quant_state.dtype is 'float16'"]),
    "no JSON": ("nf4", tensor(STATE, lambda stored: stored[1:]), "layout", [STATE, "no JSON"]),
    "weight format": ("int8", tensor(f"{UP}.weight_format", lambda it: it + 1), "layout", [f"{UP}.weight_format"]),
    "length": ("nf4", tensor(ABSMAX, lambda scales: scales[:-1]), "layout", [f"{ABSMAX} of shape [127]"]),
    "scales in fp16": ("fp4", tensor(ABSMAX, lambda scales: scales.half()), "layout", [f"{ABSMAX} in F16"]),
    "no scales": ("nf4", gone(ABSMAX), "names", [f"{ABSMAX}: it is missing"]),
    "no nested scales": ("nf4", gone(NESTED), "names", [f"{NESTED}: it is missing"]),
    "scales of another kind": (
        "nf4",
        beside(WEIGHT, f"{UP}.SCB", torch.ones(128)),
        "names",
        [f"{UP}.SCB: no tensor of the layer"],
    ),
    "a layer too many": (
        "nf4",
        beside(WEIGHT, "model.layers.2.mlp.up_proj.weight", torch.ones(2)),
        "names",
        ["model.layers.2.mlp.up_proj.weight: no tensor of the model"],
    ),
    "bias": ("nf4", tensor("model.layers.0.self_attn.q_proj.bias", next_float), "tensors", ["q_proj.bias: 1 of 64"]),
    "norm": ("nf4", tensor("model.norm.weight", next_float), "tensors", ["model.norm.weight: 1 of 64 numbers differ"]),
    "embedding": ("nf4", tensor("model.embed_tokens.weight", next_float), "tensors", ["embed_tokens.weight: 1 of"]),
    "header's kind": ("nf4", header(bnb_4bit_quant_type="fp4"), "layout", ["bnb_4bit_quant_type is 'fp4' there"]),
    "header's dtype": ("nf4", header(bnb_4bit_compute_dtype="float16"), "layout", ["bnb_4bit_compute_dtype"]),
    "double quantization": ("nf4", header(bnb_4bit_use_double_quant=False), "layout", ["bnb_4bit_use_double_quant"]),
    "storage": ("nf4", header(bnb_4bit_quant_storage="bfloat16"), "layout", ["bnb_4bit_quant_storage is 'bfloat16'"]),
    "head in codes": ("nf4", header(llm_int8_skip_modules=[]), "layout", ["llm_int8_skip_modules is []"]),
    "layer skipped": ("nf4", header(llm_int8_skip_modules=["lm_head", UP]), "layout", ["llm_int8_skip_modules", UP]),
    "threshold": ("int8", header(llm_int8_threshold=0.0), "layout", ["llm_int8_threshold is 0.0 there, 6.0"]),
    "method": ("nf4", header(quant_method="gptq"), "layout", ["quant_method is 'gptq'"]),
    "no header": (
        "nf4",
        lambda made: made.json("config.json", lambda config: config.pop("quantization_config")),
        "layout",
        ["quantization_config.quant_method is None there"],
    ),
    "heads": (
        "nf4",
        lambda made: made.json("config.json", lambda config: config.update(num_key_value_heads=4)),
        "config",
        ["num_key_value_heads is 4 there"],
    ),
    "no adapter": ("nf4", no_adapter, "files", ["adapter_model.safetensors", "cannot be read"]),
    "cut adapter": ("nf4", cut_adapter, "files", ["adapter_model.safetensors", "cannot be read"]),
    "adapter's number": ("nf4", tensor(B, next_float), "adapter", [B, "differs from what was trained"]),
    "adapter in bf16": ("nf4", tensor(B, lambda b: b.bfloat16()), "adapter", [B, "differs from what was trained"]),
    "adapter's tensor": ("nf4", gone(B), "adapter", [B, "it is missing"]),
    "adapter's alpha": (
        "nf4",
        lambda made: made.json("adapter/adapter_config.json", lambda config: config.update(lora_alpha=8)),
        "adapter",
        ["lora_alpha is 8 there"],
    ),
    "merged: a part less": ("merged", gone(ABSMAX), "names", [f"{ABSMAX}: it is missing"]),
    "merged: norm": ("merged", tensor("model.norm.weight", next_float), "tensors", ["model.norm.weight: 1 of 64"]),
    "merged: kind": ("merged", words(quant_type="fp4"), "layout", ["quant_state.quant_type is 'fp4' there"]),
    "merged: header": ("merged", header(bnb_4bit_quant_type="fp4"), "layout", ["bnb_4bit_quant_type is 'fp4' there"]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_and_named(good: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    kind, mutate, column, said = MUTANTS[name]
    mutant = good(kind).copy(tmp_path / "mutant")
    mutate(mutant)
    verdict = mutant.verdict()
    assert not verdict.passed and verdict.cells[column] not in ("ok", "0", "lossy", "-")
    assert any(all(word in str(failure) for word in said) for failure in verdict.failures), [
        *map(str, verdict.failures)
    ]
    assert all(failure.what and failure.where for failure in verdict.failures)


def test_a_base_alone_is_no_export_of_what_was_trained(good: Callable[[str], Made], tmp_path: Path) -> None:
    """Where no export.json tells what a directory is to be."""
    mutant = good("nf4").copy(tmp_path / "mutant")
    no_adapter(mutant)
    verdict = mutant.verdict({})
    assert any("the codes are those of the base" in str(failure) for failure in verdict.failures)
