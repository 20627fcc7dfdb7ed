"""Layers read from a checkpoint when they are quantized: the same numbers, in little more memory than they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

from qtrain.config.compose import load_recipe
from qtrain.errors import ModelError
from qtrain.methods.base import Base, load_base, load_for
from qtrain.methods.config import MethodSection
from qtrain.methods.method import build_method
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.models import stored, unread
from qtrain.models.config import ModelSection
from qtrain.models.quantized.tensors import TensorFiles
from qtrain.models.source import ModelSource
from qtrain.modules.unread_linear import UnreadLinear, in_file_order, read_weight
from qtrain.training.module import LanguageModule

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
reads_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]
READ = "each layer quantized as it was read"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama3, tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, tie_word_embeddings=True, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64}
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=128, rotary_dim=8, bos_token_id=0, eos_token_id=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)),
}
PACKED = {"init": "rtn", "weight": {"format": "int4", "group_size": 32}}
METHODS: dict[str, MethodSection] = {
    "nf4": QLoraOptions(r=4),
    "fp4": QLoraOptions(r=4, base="fp4", double_quant=False),
    "int8": QLoraOptions(r=4, base="int8"),
    "packed": QLoraOptions.model_validate({"r": 4, "base": "packed", "packed": PACKED}),
    "peqa": PeqaOptions.model_validate({"init": "rtn", "skip": ["*.k_proj"], "head": True}),
    "hqq": PeqaOptions.model_validate({**PACKED, "init": "hqq"}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A tiny model of random bf16 weights in several shards."""

    def make(kind: str) -> Path:
        torch.manual_seed(3)
        directory = tmp_path / "model"
        model: Any = MODELS[kind]()
        model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        return directory

    return make


def both(directory: Path, options: MethodSection, dtype: torch.dtype) -> tuple[Base, PreTrainedModel]:
    section = ModelSection(path=str(directory))
    keys: dict[str, Any] = {"compute_dtype": dtype, "device": CPU}
    return load_for(build_method(options), section, dtype, **keys), load_base(section, options, dtype, **keys)


def prepared(options: MethodSection, model: PreTrainedModel, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return build_method(options).prepare(model, compute_dtype=dtype, device=CPU).eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Codes, scales, buffers: everything that has a name."""
    return {**dict(model.named_buffers()), **{k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    found, wanted = tensors(one), tensors(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    [
        *(("llama", method, torch.float32) for method in METHODS),
        *((kind, "nf4", torch.bfloat16) for kind in MODELS),
        ("llama3, tied", "packed", torch.bfloat16),
    ],
)
def test_the_same_model_bit_by_bit(checkpoint: Callable[..., Path], kind: str, method: str, dtype: torch.dtype) -> None:
    options = METHODS[method]
    found, whole = both(checkpoint(kind), options, dtype)
    assert found.loading is not None and (found.loading == READ) == (kind != "mixtral")
    assert found.model.config.to_dict() == whole.config.to_dict()
    assert found.model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert found.model.name_or_path == whole.name_or_path
    assert str(found.model._weight_conversions) == str(whole._weight_conversions)
    assert found.model.all_tied_weights_keys == whole.all_tied_weights_keys
    one, other = (prepared(options, model, dtype) for model in (found.model, whole))
    assert_same(one, other)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_layers_stay_in_their_files_until_they_are_quantized(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    get = TensorFiles.get

    def noted(self: TensorFiles, name: str) -> Tensor:
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(TensorFiles, "get", noted)
    section = ModelSection(path=str(checkpoint("llama")))
    method = build_method(METHODS["nf4"])
    model = load_for(method, section, torch.float32, compute_dtype=torch.float32, device=CPU).model
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, UnreadLinear)}
    assert len(linears) == 14 and not any(name.removesuffix(".weight") in linears for name in read)
    assert all(
        parameter.is_meta == (name.removesuffix(".weight") in linears) for name, parameter in model.named_parameters()
    )
    read.clear()
    method.prepare(model, compute_dtype=torch.float32, device=CPU)
    assert sorted(read) == sorted(f"{name}.weight" for name in linears)
    files = TensorFiles(Path(str(section.path)))
    places = [files.place(name) for name in read]
    assert places == sorted(places)
    assert not any(isinstance(layer, UnreadLinear) for layer in model.modules())


def test_the_order_of_layers_in_memory_stays() -> None:
    layers = {name: nn.Linear(2, 2) for name in "bac"}
    assert list(in_file_order(layers)) == ["b", "a", "c"]
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    lazy = {
        name: UnreadLinear(layer, partial(weights.__getitem__, name), ("file", place))
        for place, (name, layer) in zip((7, 9, 8), layers.items(), strict=True)
    }
    assert list(in_file_order(lazy)) == ["b", "c", "a"]
    assert all(read_weight(lazy[name]) is weights[name] and lazy[name].weight.is_meta for name in lazy)
    assert all(lazy[name].bias is layers[name].bias for name in lazy)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """All tensors into one file, changed."""
    content: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        content |= load_file(file)
        file.unlink()
    change(content)
    save_file(content, directory / "model.safetensors", {"format": "pt"})
    (directory / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_beside_the_embedding(checkpoint: Callable[..., Path], same: bool) -> None:
    directory = checkpoint("llama3, tied")

    def store(content: dict[str, Tensor]) -> None:
        content["lm_head.weight"] = content["model.embed_tokens.weight"] * (1 if same else 2)

    edit(directory, store)
    found, whole = both(directory, METHODS["nf4"], torch.float32)
    assert found.loading == READ
    for model in (found.model, whole):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    assert found.model.all_tied_weights_keys == whole.all_tied_weights_keys
    assert_same(*(prepared(METHODS["nf4"], model, torch.float32) for model in (found.model, whole)))


def test_what_the_model_does_not_know_is_left_where_it_is(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("llama")
    edit(directory, lambda content: content.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    found, whole = both(directory, METHODS["nf4"], torch.float32)
    assert found.loading == READ
    assert_same(*(prepared(METHODS["nf4"], model, torch.float32) for model in (found.model, whole)))


def missing(content: dict[str, Tensor]) -> None:
    del content["model.layers.1.mlp.up_proj.weight"]


def misshapen(content: dict[str, Tensor]) -> None:
    content["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 32)


@pytest.mark.parametrize("damage", [missing, misshapen])
def test_errors_are_those_of_a_whole_load(
    checkpoint: Callable[..., Path], damage: Callable[[dict[str, Tensor]], None]
) -> None:
    directory = checkpoint("llama")
    edit(directory, damage)
    section = ModelSection(path=str(directory))
    keys: dict[str, Any] = {"compute_dtype": torch.float32, "device": CPU}
    with pytest.raises(ModelError) as whole:
        load_base(section, METHODS["nf4"], torch.float32, **keys)
    with pytest.raises(ModelError) as found:
        load_for(build_method(METHODS["nf4"]), section, torch.float32, **keys)
    assert str(found.value) == str(whole.value) and "up_proj" in str(found.value)


def test_a_damaged_shard_is_told(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("llama")
    shard = max(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        both(directory, METHODS["nf4"], torch.float32)


@pytest.mark.parametrize(
    ("conversion", "reason"),
    [
        (
            WeightConverter("q_proj.weight", "q_proj.weight", operations=[Transpose(0, 1)]),
            "transformers computes model.layers.0.self_attn.q_proj.weight from what the files hold under that name",
        ),
        (
            WeightRenaming("layers.0.mlp.up_proj", "layers.0.mlp.gate_proj"),
            "takes model.layers.0.mlp.up_proj.weight of the files for model.layers.0.mlp.gate_proj.weight",
        ),
    ],
)
def test_what_transformers_converts_under_the_same_name_is_loaded_whole(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, conversion: Any, reason: str
) -> None:
    monkeypatch.setattr(unread, "get_model_conversion_mapping", lambda model: [conversion])
    found, _ = both(checkpoint("llama"), METHODS["nf4"], torch.float32)
    assert found.loading is not None and found.loading.startswith("whole, then quantized: ") and reason in found.loading


def test_a_method_that_needs_all_weights_loads_them(tiny_llama_dir: Path) -> None:
    for options in (QatOptions(), QLoraOptions(base="none"), PeqaOptions()):
        found, _ = both(tiny_llama_dir, options, torch.float32)
        assert found.loading is None
        assert not any(parameter.is_meta for parameter in found.model.parameters())


def test_a_run_says_how_its_model_came_into_memory(tiny_llama_dir: Path) -> None:
    def loading(*words: str) -> str | None:
        config = load_recipe("qlora_llama", f"model.path={tiny_llama_dir}", "data.train=unused.txt", *words)
        module = LanguageModule(config)
        module.build(CPU)
        return module.loading

    assert loading() == READ
    assert loading("distill.loss=forward_kl", "data.packing=false") == (
        "whole, then quantized: the teacher is model.path in full precision"
    )


def test_of_a_hub_id_only_the_weights_of_its_index_come(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama")
    asked: dict[str, Any] = {}

    def snapshot(hub_id: str, **keys: Any) -> str:
        asked.update(keys, hub_id=hub_id)
        return str(directory)

    hub = ModelSource("hub", "org/name")
    monkeypatch.setattr(stored, "find_model", lambda section: hub)
    monkeypatch.setattr(unread, "find_model", lambda section: hub)
    monkeypatch.setattr(stored, "snapshot_download", snapshot)
    monkeypatch.setattr(stored, "hf_hub_download", lambda hub_id, name, **keys: str(directory / name))
    section = ModelSection(path="org/name", revision="main")
    model = unread.load_unread(section, torch.float32, CPU, lambda model: ["model.layers.0.mlp.up_proj"])
    assert isinstance(model, PreTrainedModel)
    assert model.name_or_path == model.config.name_or_path == "org/name"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert asked["allow_patterns"] == [*sorted(set(index["weight_map"].values())), "*.json"]
    assert (asked["hub_id"], asked["revision"]) == ("org/name", "main")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """85 MB in 7 shards, of 12 layers."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 4000}
    config = LlamaConfig.from_dict({**shape, "num_attention_heads": 8, "dtype": "bfloat16"})
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="14MB")
    return tmp_path / "model"


def excess(directory: Path, case: str) -> float:
    """The peak of a process that loads and quantizes, less what the model takes then; in shards and a layer."""
    command = [sys.executable, "-m", "benchmarks.load_7b", str(directory), case, "--alone"]
    # One thread: each has buffers and freed blocks of its own, 5 to 15 MB, which count beside shards of 14.
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, env=one)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    files = [file.stat().st_size for file in directory.glob("*.safetensors")]
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512)
    assert len(files) >= 6 and 8 * layer < sum(files)
    return float(figures["host"] - figures["final"]) / (max(files) + layer)


@reads_proc
def test_at_most_a_shard_and_a_layer_above_the_quantized_model(sharded: Path) -> None:
    assert excess(sharded, "nf4-read") <= 1


@pytest.mark.slow
@reads_proc
def test_so_it_is_with_every_base_and_not_of_a_whole_load(sharded: Path) -> None:
    found = {case: excess(sharded, case) for case in ("int8-read", "packed-read", "peqa-read", "nf4-whole")}
    assert max(excess for case, excess in found.items() if case != "nf4-whole") <= 1 < 2 < found["nf4-whole"]
