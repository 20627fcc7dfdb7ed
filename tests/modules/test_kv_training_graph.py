"""Keys and values in the training graph: what is quantized, where, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from qtrain.errors import ModelError
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import kv_quantizers, prepare_kv, remove_kv

KINDS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi3")
SECTIONS: dict[str, dict[str, Any]] = {
    "before, per token": {"site": "pre_rope", "share": "per_token", "format": "int4", "symmetric": False},
    "before, per head": {"site": "pre_rope", "share": "per_head", "format": "int4"},
    "after, per head": {"format": "int4"},
    "after, per token": {"share": "per_token", "format": "int4", "symmetric": False},
    "window": {"share": "per_channel", "group_size": 4, "residual": 5, "format": "int2", "symmetric": False},
}


def tiny(kind: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A random decoder with 4 heads of 16, two of them for keys (GPT-NeoX: 4)."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8 if kind in ("gemma2", "gemma3_text") else None,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gpt_neox":
        shape.pop("num_key_value_heads")
    attention = "eager" if kind == "gemma2" else attention  # transformers has no sdpa with Gemma 2's capped scores
    config = AutoConfig.for_model(kind, **shape | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def ids(rows: int = 2, length: int = 21) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def absmax(x: Tensor, bits: int) -> Tensor:
    """Symmetric round to nearest along the last dimension, written down once more."""
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_off_or_removed_is_the_plain_model(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    plain, attention = model(ids()).logits, model.config._attn_implementation
    names = set(model.state_dict())
    for section in SECTIONS.values():
        prepared = prepare_kv(model, KVCacheSection(**section))
        assert len(prepared) == 2 and set(model.state_dict()) == names
        assert not torch.allclose(model(ids()).logits, plain, atol=1e-2)
        for _, quantizer in kv_quantizers(model):
            quantizer.enabled = False
        assert torch.equal(model(ids()).logits, plain)
        remove_kv(model)
        assert model.config._attn_implementation == attention and not list(kv_quantizers(model))
        assert torch.equal(model(ids()).logits, plain)


@pytest.mark.parametrize("share", ["per_head", "per_token"])
@pytest.mark.parametrize("site", ["pre_rope", "post_rope"])
def test_llama_by_hand(site: str, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    judged = copy.deepcopy(model)
    prepare_kv(model, KVCacheSection(site=site, share=share, format="int4"))

    def fake(x: Tensor) -> Tensor:
        if share == "per_head":
            return absmax(x, 4)
        return absmax(x.transpose(1, 2).flatten(2), 4).unflatten(-1, (2, 16)).transpose(1, 2)

    rotate, attend = modeling_llama.apply_rotary_pos_emb, modeling_llama.eager_attention_forward
    if site == "pre_rope":
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: rotate(q, fake(k), *rest))

    def judge(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return attend(module, query, key if site == "pre_rope" else fake(key), fake(value), mask, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", judge)
    judged.set_attn_implementation("eager")
    expected = judged(ids()).logits
    monkeypatch.undo()
    assert torch.allclose(model(ids()).logits, expected, atol=1e-5)


def test_twice_is_an_error() -> None:
    model = tiny("llama")
    prepare_kv(model, KVCacheSection())
    with pytest.raises(ModelError, match="already"):
        prepare_kv(model, KVCacheSection())
