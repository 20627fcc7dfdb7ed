"""Models and tokenizers from directories and GGUF files, in the dtype that was resolved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qtrain.errors import ModelError
from qtrain.models import dtype as dtypes
from qtrain.models.config import ModelSection
from qtrain.models.dtype import has_bf16, resolve_dtypes
from qtrain.models.load import is_quantized_export, load_model, load_tokenizer

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_directory(tiny_llama_dir: Path, tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = load_model(ModelSection(path=str(tiny_llama_dir)), dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value.to(dtype)) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for(tiny_llama_dir: Path, attention: str) -> None:
    model = load_model(ModelSection(path=str(tiny_llama_dir), attention=attention), FP32)
    assert model.config._attn_implementation == attention


def test_a_tokenizer_gets_a_pad_token(
    tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = load_tokenizer(ModelSection(path=str(tiny_llama_dir)))
    assert own.pad_token == "<pad>"
    assert own.encode("The quick brown fox") == tiny_tokenizer.encode("The quick brown fox")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    without = load_tokenizer(ModelSection(path=str(bare)))
    assert (without.pad_token, without.pad_token_id) == (own.eos_token, own.eos_token_id)


def test_damaged_weights_are_told(tiny_llama_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_dir, broken)
    (broken / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=str(broken)):
        load_model(ModelSection(path=str(broken)), FP32)


def test_an_architecture_that_nobody_knows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    (other / "config.json").write_text(json.dumps({"model_type": "nothing_of_the_kind"}))
    with pytest.raises(ModelError, match="nothing_of_the_kind"):
        load_model(ModelSection(path=str(other)), FP32)


def test_code_that_comes_with_a_model_is_not_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    (other / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "ours", "auto_map": {"AutoConfig": "ours.C", "AutoModelForCausalLM": "ours.M"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load_model(ModelSection(path=str(other)), FP32)
    assert not (tmp_path / "ran").exists()


def test_a_quantized_export_is_told_from_plain_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert not is_quantized_export(ModelSection(path=str(tiny_llama_dir)))
    export = tmp_path / "export"
    shutil.copytree(tiny_llama_dir, export)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"quantization_config": {}}, indent=2))
    assert is_quantized_export(ModelSection(path=str(export)))


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs side by side, as llama.cpp keeps q and k; transformers keeps halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def tiny_gguf(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    config = tiny_llama.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tiny_tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if number < 4 else 1 for _, number in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in tiny_llama.state_dict().items():
        weight = value
        if "q_proj" in name:
            weight = paired(value, config.num_attention_heads)
        if "k_proj" in name:
            weight = paired(value, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tiny_gguf: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = load_model(ModelSection(path=str(tiny_gguf)), FP32)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in tiny_llama.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_llama(IDS).logits)
    model.save_pretrained(tmp_path / "plain")  # a GGUF load as transformers leaves it cannot be saved
    again = load_model(ModelSection(path=str(tmp_path / "plain")), FP32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_tokenizer_of_a_gguf_file(tiny_gguf: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = load_tokenizer(ModelSection(path=str(tiny_gguf)))
    text = "The quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True).strip() == text
    assert tokenizer.pad_token_id is not None


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(ModelSection(path=str(tmp_path / "broken.gguf")), FP32)


@pytest.mark.parametrize(
    ("storage", "compute", "units", "expected"),
    [
        ("auto", "auto", True, (BF16, BF16)),
        ("auto", "auto", False, (FP32, FP32)),
        ("fp32", "auto", True, (FP32, BF16)),
        ("auto", "fp32", True, (FP32, FP32)),
        ("auto", "bf16", False, (BF16, BF16)),
        ("bf16", "bf16", False, (BF16, BF16)),
        ("fp32", "bf16", False, (FP32, BF16)),
    ],
)
def test_dtypes_of_storage_and_products(
    storage: str, compute: str, units: bool, expected: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "has_bf16", lambda device: units)
    assert resolve_dtypes(storage, compute, CPU) == expected


@pytest.mark.parametrize("compute", ["fp32", "auto"])
def test_stored_in_bf16_but_multiplied_in_fp32(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "has_bf16", lambda device: False)
    with pytest.raises(ModelError, match=r"method\.compute_dtype=bf16"):
        resolve_dtypes("bf16", compute, CPU)


def test_a_processor_has_bf16_where_it_has_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert has_bf16(CPU) is tiles
    assert not has_bf16(torch.device("mps"))
