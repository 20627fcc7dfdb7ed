"""Keys and values in the training graph: what is quantized, where, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from qtrain.data.isolation import check_isolation
from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.prepare import kv_quantizers, prepare_kv, remove_kv
from qtrain.modules.quant_linear import QuantLinear

Decoder = Callable[..., PreTrainedModel]
KINDS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi3")
SECTIONS: dict[str, dict[str, Any]] = {
    "before, per token": {"site": "pre_rope", "share": "per_token", "format": "int4", "symmetric": False},
    "before, per head": {"site": "pre_rope", "share": "per_head", "format": "int4"},
    "after, per head": {"format": "int4"},
    "after, per token": {"share": "per_token", "format": "int4", "symmetric": False},
    "window": {"share": "per_channel", "group_size": 4, "residual": 5, "format": "int2", "symmetric": False},
}
IDS = torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(1))


def absmax(x: Tensor, bits: int) -> Tensor:
    """Symmetric round to nearest along the last dimension, written down once more."""
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_off_or_removed_is_the_plain_model(decoder: Decoder, kind: str, attention: str) -> None:
    model = decoder(kind, attention)
    plain, attention = model(IDS).logits, model.config._attn_implementation
    names = set(model.state_dict())
    for section in SECTIONS.values():
        prepared = prepare_kv(model, KVCacheSection(**section))
        assert len(prepared) == 2 and set(model.state_dict()) == names
        assert not torch.allclose(model(IDS).logits, plain, atol=1e-2)
        for _, quantizer in kv_quantizers(model):
            quantizer.enabled = False
        assert torch.equal(model(IDS).logits, plain)
        remove_kv(model)
        assert model.config._attn_implementation == attention and not list(kv_quantizers(model))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_as_long_as_the_text_changes_nothing(decoder: Decoder, kind: str, attention: str) -> None:
    """The window's own attention, with capped scores (Gemma 2), sliding layers and padding, is the model's."""
    model = decoder(kind, attention)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    expected = model(IDS, attention_mask=mask, labels=IDS)
    prepare_kv(model, KVCacheSection(format="int2", residual=21))
    found = model(IDS, attention_mask=mask, labels=IDS)
    assert torch.allclose(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("share", ["per_head", "per_token"])
@pytest.mark.parametrize("site", ["pre_rope", "post_rope"])
def test_llama_by_hand(decoder: Decoder, site: str, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama")
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
    expected = judged(IDS).logits
    monkeypatch.undo()
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_neox", "phi3"])
def test_keys_enter_the_rotary_embedding_on_their_levels(
    decoder: Decoder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as heads: the shape alone does not tell which is which."""
    model = decoder(kind, num_attention_heads=4, **({} if kind == "gpt_neox" else {"num_key_value_heads": 4}))
    modelling = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    rotate, seen = modelling.apply_rotary_pos_emb, []
    monkeypatch.setattr(
        modelling, "apply_rotary_pos_emb", lambda q, k, *rest: (seen.append((q, k)), rotate(q, k, *rest))[1]
    )
    plain = IDS[:, :4]
    model(plain)
    prepare_kv(model, KVCacheSection(site="pre_rope", share="per_token", format="int4"))
    model(plain)
    (first_query, first_key), *_, (query, key), _ = seen
    assert torch.equal(query, first_query)
    flat = first_key.transpose(1, 2).flatten(2)
    assert torch.allclose(key.transpose(1, 2).flatten(2), absmax(flat, 4), atol=1e-6)
    assert all(len(token.unique()) <= 15 for row in key.transpose(1, 2).flatten(2) for token in row)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the name that 5.17 knows
def test_gradients_reach_the_projections(decoder: Decoder, section: dict[str, Any]) -> None:
    model = decoder("llama").train()
    prepare_kv(model, KVCacheSection(**section))
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients = [layer.self_attn.k_proj.weight.grad for layer in model.model.layers]
        losses.append((loss.detach(), *gradients))
        assert all(bool(gradient.abs().sum() > 0) and bool(gradient.isfinite().all()) for gradient in gradients)
    assert all(torch.equal(one, two) for one, two in zip(*losses, strict=True))


def test_straight_through(decoder: Decoder) -> None:
    """Where attention is linear in v the gradient of v is the plain one."""
    model = decoder("llama", num_hidden_layers=1)
    value = model.model.layers[0].self_attn.v_proj.weight
    gradients = []
    for prepared in (False, True):
        if prepared:
            prepare_kv(model, KVCacheSection(format="int2"))
            next(kv_quantizers(model))[1].enabled = False
        model.zero_grad()
        probe = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(2))
        rotary = model.model.rotary_emb(probe, torch.arange(21)[None])
        model.model.layers[0].self_attn(probe, position_embeddings=rotary, attention_mask=None)[0].sum().backward()
        assert value.grad is not None
        gradients.append(value.grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
def test_a_decoder_layer_compiles_whole(decoder: Decoder, section: dict[str, Any]) -> None:
    model = decoder("llama", num_hidden_layers=1)
    prepare_kv(model, KVCacheSection(**section))
    layer = model.model.layers[0]
    x = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(21)[None])
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        output = run(x, position_embeddings=rotary, attention_mask=None)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, layer.self_attn.k_proj.weight])))
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("range_", ["static", "learned"])
def test_one_range_for_all_tokens(decoder: Decoder, range_: str) -> None:
    model = decoder("llama")
    plain = model(IDS).logits
    prepare_kv(model, KVCacheSection(format="int8", range=range_))
    with pytest.raises(ModelError, match="no range yet"):
        model(IDS)
    for _, quantizer in kv_quantizers(model):
        quantizer.observe()
    assert torch.equal(model(IDS).logits, plain)
    for _, quantizer in kv_quantizers(model):
        quantizer.settle()
    settled = model(IDS).logits
    assert torch.allclose(settled, plain, atol=0.2) and not torch.equal(settled, plain)
    name = "model.layers.0.self_attn.kv_quantizer.key.scale"
    state = copy.deepcopy(model.state_dict())
    assert state[name].numel() == 1 and (name in dict(model.named_parameters())) == (range_ == "learned")
    other = decoder("llama")
    prepare_kv(other, KVCacheSection(format="int8", range=range_))
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, settled)
    if range_ == "learned":
        model(IDS, labels=IDS).loss.backward()
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None and bool(gradient != 0)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "window"])
def test_packed_documents_stay_apart(decoder: Decoder, name: str) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    check_isolation(model, 96)


def test_windows_and_groups_do_not_know_documents(decoder: Decoder) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(**SECTIONS["window"]))
    with pytest.raises(ModelError, match="see each other"):
        check_isolation(model, 96)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_quantized_and_adapted_projections(decoder: Decoder, kind: str) -> None:
    """The hook's input is what the projection gives with its adapters."""
    section = KVCacheSection(site="pre_rope", share="per_token", format="int4")
    model = decoder(kind)
    for layer in model.model.layers:
        layer.self_attn.v_proj = QuantLinear.from_linear(layer.self_attn.v_proj, QuantizerSection(format="int8"))
    adapters = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, adapters)
    assert prepare_kv(adapted, section) == [f"base_model.model.model.layers.{i}.self_attn" for i in range(2)]
    separate = adapted(input_ids=IDS).logits
    adapted.merge_adapter()
    assert torch.allclose(adapted(input_ids=IDS).logits, separate, atol=1e-4)


def test_a_module_replaced_afterwards_is_an_error(decoder: Decoder) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(site="pre_rope"))
    attention = model.model.layers[1].self_attn
    attention.k_proj = QuantLinear.from_linear(attention.k_proj, QuantizerSection(format="int8"))
    with pytest.raises(ModelError, match="k_proj of a LlamaAttention was replaced"):
        model(IDS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_copy_has_its_own_quantizers(decoder: Decoder, name: str) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    quantized = model(IDS).logits
    twin = copy.deepcopy(model)
    for _, quantizer in kv_quantizers(model):
        quantizer.enabled = False
    assert torch.equal(twin(IDS).logits, quantized) and not torch.equal(model(IDS).logits, quantized)
    remove_kv(twin)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_flash_attention_is_called_by_its_own_name(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        called.append((module.config._attn_implementation, module.is_causal, module.layer_idx, key))
        assert next(layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)).weight.dtype
        return torch.zeros(*query.shape[:1], query.shape[2], query.shape[1], query.shape[3]), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model = decoder("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    prepare_kv(model, KVCacheSection(format="int2"))
    model(IDS)
    assert model.config._attn_implementation == "qtrain_flash_attention_2"
    assert [call[:3] for call in called] == [("flash_attention_2", True, 0), ("flash_attention_2", True, 1)]
    assert all(len(row.unique()) <= 3 for row in called[0][3].flatten(0, 2))
    remove_kv(model)
    with pytest.raises(ModelError, match="attention flash_attention_2"):
        prepare_kv(model, KVCacheSection(**SECTIONS["window"]))


def test_unknown_layouts_are_refused_by_name(decoder: Decoder) -> None:
    model = decoder("gpt2", n_embd=64, n_head=4, n_layer=2)
    with pytest.raises(ModelError, match="GPT2Attention has no k_proj and no v_proj.*c_attn") as caught:
        prepare_kv(model, KVCacheSection(site="pre_rope"))
    assert caught.value.fix == "method.kv_cache.site=post_rope"
    assert len(prepare_kv(model, KVCacheSection())) == 2
    with pytest.raises(ModelError, match="already"):
        prepare_kv(model, KVCacheSection())
    with pytest.raises(ModelError, match="no self-attention"):
        prepare_kv(decoder("llama").lm_head, KVCacheSection())
