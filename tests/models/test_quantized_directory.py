"""What all quantized directories have in common: headers, shards, tied weights, and what is not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.models.quantized.checkpoint import QuantizedCheckpoint, load_skeleton, read_quantized
from qtrain.models.quantized.header import quant_method, read_header

Make = Callable[..., Any]
LAYER = "model.layers.0.self_attn.q_proj"
HEADER = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}


def rows(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
    """The plainest of formats."""
    codes = torch.randint(-128, 128, linear.weight.shape, dtype=torch.int8)
    scale = torch.rand(len(codes), 1).add(0.1).mul(1e-3).to(torch.bfloat16)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def filled(checkpoint: QuantizedCheckpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = load_skeleton(checkpoint, dtype)
    for name, load in checkpoint.records.items():
        model.get_submodule(name).weight = nn.Parameter(load().dequantize(dtype))
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_the_whole_model(make_checkpoint: Make, kind: str, tied: bool, shards: int) -> None:
    made = make_checkpoint(rows, HEADER, kind=kind, tied=tied, shards=shards)
    checkpoint = read_quantized(made.directory)
    assert not hasattr(checkpoint.config, "quantization_config")
    model = filled(checkpoint)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {b.device.type for b in model.buffers()} == {"cpu"}
    assert model.generation_config.eos_token_id == 2
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made.model(ids).logits)
        tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, made.model)]
    assert torch.equal(*tokens)


def test_another_dtype_and_attention(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER)
    model = load_skeleton(read_quantized(made.directory), torch.bfloat16, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, made.model.model.rotary_emb.inv_freq)
    assert [name for name, p in model.named_parameters() if p.is_meta] == [f"{name}.weight" for name in made.weights]


def test_the_model_can_be_saved_as_plain(make_checkpoint: Make, tmp_path: Path) -> None:
    made = make_checkpoint(rows, HEADER, tied=True)
    filled(read_quantized(made.directory)).save_pretrained(tmp_path / "plain")
    again = type(made.model).from_pretrained(tmp_path / "plain")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in made.model.state_dict().items())


def test_a_quantized_head(make_checkpoint: Make) -> None:
    def also_head(tensors: dict[str, Tensor]) -> None:
        parts, _ = rows("lm_head", made.model.lm_head)
        tensors |= {f"lm_head.{key}": value for key, value in parts.items()}

    made = make_checkpoint(rows, HEADER | {"ignore": []})
    made.edit_tensors(also_head)
    assert "lm_head" in read_quantized(made.directory).records
    made.edit_config(tie_word_embeddings=True)
    with pytest.raises(
        ModelError, match=r"lm_head\.weight is quantized, and tied(.|\n)*\"tie_word_embeddings\": false"
    ):
        load_skeleton(read_quantized(made.directory), torch.float32)


def test_what_old_checkpoints_hold_besides(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    made.edit_tensors(lambda tensors: tensors.update({key: torch.ones(8)}))
    load_skeleton(read_quantized(made.directory), torch.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.__delitem__("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight of shape \[7\](.|\n)*\[64\]"),
        (lambda t: t.update({"model.other.weight": torch.ones(7)}), r"model\.other\.weight belongs to no part"),
        (lambda t: t.update({"model.norm.weight_scale": torch.ones(7)}), r"model\.norm is quantized there"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight_scale": torch.ones(7, 1)}), r"layers\.2.*is quantized"),
    ],
)
def test_tensors_that_are_not_the_models(
    make_checkpoint: Make, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    made = make_checkpoint(rows, HEADER)
    made.edit_tensors(damage)
    with pytest.raises(ModelError, match=message):
        load_skeleton(read_quantized(made.directory), torch.float32)


def test_a_layer_that_was_left_out(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER)

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.weight_scale"]

    made.edit_tensors(lose)
    with pytest.raises(ModelError, match=r"q_proj\.weight is missing"):
        load_skeleton(read_quantized(made.directory), torch.float32)


def test_shards_and_their_index(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER, shards=2)
    index = made.directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = made.directory / "model-00002-of-00002.safetensors"

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"more": shard.name}}))
    with pytest.raises(ModelError, match=r"more is not in model-00002"):
        read_quantized(made.directory)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match=r"elsewhere(.|\n)*beside their index"):
        read_quantized(made.directory)
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"no index of shards"):
        read_quantized(made.directory)
    index.write_text(json.dumps(content))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: it cannot be read(.|\n)*download"):
        read_quantized(made.directory)
    shard.unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: it cannot be read"):
        read_quantized(made.directory)


def test_pickles_are_not_opened(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER)
    (made.directory / "model.safetensors").rename(made.directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle runs code"):
        read_quantized(made.directory)


def test_headers(make_checkpoint: Make, tiny_llama_dir: Path) -> None:
    assert quant_method(tiny_llama_dir) is None and read_header(tiny_llama_dir) is None
    with pytest.raises(ModelError, match="plain"):
        read_quantized(tiny_llama_dir)
    made = make_checkpoint(rows, HEADER)
    assert quant_method(made.directory) == "compressed-tensors"
    made.edit_config(quantization_config=None, compression_config=HEADER)
    assert read_quantized(made.directory).method == "compressed-tensors"
    for content, message in [
        ({"bits": 4}, "no quant_method"),
        ([4], "no object"),
        ({"quant_method": "vptq"}, r"'vptq' is not read(.|\n)*gptq, awq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, r"no tensor in its layout"),
    ]:
        made.edit_config(quantization_config=content, compression_config=None)
        with pytest.raises(ModelError, match=message):
            read_quantized(made.directory)
    (made.directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: it cannot be read"):
        read_quantized(made.directory)


def test_an_architecture_that_nobody_knows(make_checkpoint: Make) -> None:
    made = make_checkpoint(rows, HEADER)
    made.edit_config(model_type="nothing_of_the_kind")
    with pytest.raises(ModelError, match="nothing_of_the_kind"):
        read_quantized(made.directory)


def test_nothing_is_read_before_it_is_asked_for(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.models.quantized.tensors import TensorFiles

    made = make_checkpoint(rows, HEADER)
    read: list[str] = []
    get = TensorFiles.get
    monkeypatch.setattr(TensorFiles, "get", lambda self, name: read.append(name) or get(self, name))
    checkpoint = read_quantized(made.directory)
    assert read == []
    checkpoint.records[LAYER]()
    assert set(read) == {f"{LAYER}.weight", f"{LAYER}.weight_scale"}
