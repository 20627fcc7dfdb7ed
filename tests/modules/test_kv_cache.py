"""A cache of codes: the same logits as the training graph, and generate's whole life with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from qtrain.errors import ModelError
from qtrain.modules.kv.cache import QuantizedCache, quantized_cache
from qtrain.modules.kv.codes import Codes
from qtrain.modules.kv.config import KVCacheSection
from qtrain.modules.kv.layer import RotatedLayer
from qtrain.modules.kv.layout import AllHeads, OneHead
from qtrain.modules.kv.prepare import kv_quantizers, prepare_kv, remove_kv
from qtrain.modules.kv.quantizer import KVQuantizer
from qtrain.modules.quantizer import Quantizer

Decoder = Callable[..., PreTrainedModel]
KINDS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi3", "stablelm")
SECTIONS: dict[str, dict[str, Any]] = {
    "before, per token": {"site": "pre_rope", "share": "per_token", "format": "int4", "symmetric": False},
    "before, per head": {"site": "pre_rope", "format": "fp8_e4m3"},
    "int4 per head": {"format": "int4"},
    "int4 per token": {"share": "per_token", "format": "int4", "symmetric": False},
    "int8 per head": {"format": "int8", "symmetric": False},
    "int2 in groups": {"format": "int2", "mid_rise": True, "group_size": 8},
    "int3": {"format": "int3"},
    "fp8 per token": {"share": "per_token", "format": "fp8_e5m2"},
    "K8 V4": {"key": {"format": "int8"}, "value": {"format": "int4"}},
    "window": {"format": "int4", "residual": 3},
    "KIVI": {"format": "int2", "symmetric": False, "share": "per_channel", "group_size": 4, "residual": 5},
}
GENERATED = ("before, per token", "int4 per head", "KIVI")
IDS = torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(model: PreTrainedModel, cache: QuantizedCache, prefill: int = 9, **options: Any) -> Tensor:
    """Logits of IDS: a prefill, a chunk of 3, then token by token."""
    bounds = [0, prefill, prefill + 3, *range(prefill + 4, 22)]
    parts = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        now = {
            name: value[:, begin:end] if name == "position_ids" else value[:, :end] for name, value in options.items()
        }
        parts.append(model(IDS[:, begin:end], past_key_values=cache, use_cache=True, **now).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_gives_the_training_graphs_logits(decoder: Decoder, kind: str, attention: str) -> None:
    model = decoder(
        kind, attention
    ).double()  # in fp32 products of other shapes move a number across a boundary at times
    for name, section in SECTIONS.items():
        prepare_kv(model, KVCacheSection(**section))
        expected = model(IDS).logits
        with quantized_cache(model) as cache:
            assert torch.allclose(decoded(model, cache), expected, atol=1e-5), name
            assert cache.get_seq_length() == 21
            assert torch.equal(model(IDS).logits, expected)  # without the cache: the training graph, in its context too
        remove_kv(model)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@torch.no_grad()
def test_in_single_precision(decoder: Decoder, kind: str) -> None:
    model = decoder(kind)
    for name in GENERATED:
        prepare_kv(model, KVCacheSection(**SECTIONS[name]))
        with quantized_cache(model) as cache:
            assert torch.allclose(decoded(model, cache), model(IDS).logits, atol=1e-5), name
        remove_kv(model)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ("window", "KIVI")])
@torch.no_grad()
def test_codes_are_the_training_graphs(decoder: Decoder, name: str) -> None:
    model = decoder("llama").double()
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    seen: list[Tensor] = []
    for _, quantizer in kv_quantizers(model):
        quantizer.register_forward_hook(lambda quantizer, inputs, _: seen.append(quantizer.codes(inputs[0])[0]))
    model(IDS)
    expected = list(seen)
    with quantized_cache(model) as cache:
        decoded(model, cache)
        stored = [codes.codes() for layer in cache.coded for codes in (layer.key, layer.value)]
    assert len(expected) == len(stored) == 4
    assert all(torch.equal(one.float(), two.float()) for one, two in zip(expected, stored, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_read_is_fake_quantize(data: Any) -> None:
    draw = data.draw
    chosen = draw(st.sampled_from(["int2", "int3", "int4", "int5", "int8", "fp8_e4m3", "fp8_e5m2"]))
    symmetric = chosen.startswith("fp8") or draw(st.booleans())
    section = KVCacheSection(
        format=chosen,
        symmetric=symmetric,
        share=draw(st.sampled_from(["per_head", "per_token"])),
        scale_dtype=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    quantizer = KVQuantizer(section)
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    x = torch.randn(2, heads, sum(lengths), dim, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(
        dtype
    )
    codes = Codes(quantizer.key, quantizer.key_layout)
    for part in x.split(lengths, dim=2):
        codes.append(part)
    assert len(codes) == sum(lengths) and codes.numel == x.numel()
    if len(codes):
        read = codes.read()
        assert read.dtype == dtype and torch.equal(read, quantizer(x, x)[0])


def test_bytes() -> None:
    x = torch.randn(2, 3, 10, 64)
    for chosen, share, expected in (
        ("int8", OneHead(), 2 * 3 * 10 * (64 + 4)),
        ("int4", OneHead(), 2 * 3 * 10 * (32 + 4)),
        ("int2", OneHead(), 2 * 3 * 10 * (16 + 4)),
        ("fp8_e4m3", AllHeads(), 2 * 10 * (192 + 4)),
        ("int4", AllHeads(), 2 * 10 * (96 + 4)),
    ):
        codes = Codes(Quantizer(KVCacheSection(format=chosen).key_section()), share)
        codes.append(x)
        assert codes.nbytes == expected
    codes = Codes(
        Quantizer(KVCacheSection(format="int4", symmetric=False, scale_dtype="fp16").key_section()), AllHeads()
    )
    codes.append(x)
    assert codes.nbytes == 2 * 10 * (96 + 2 + 1)


@torch.no_grad()
def test_compression(decoder: Decoder) -> None:
    model = decoder("llama", head_dim=64)
    prepare_kv(model, KVCacheSection(format="int4"))
    with quantized_cache(model) as cache:
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        decoded(model, cache)
        assert cache.nbytes == 2 * 2 * 2 * 2 * 21 * (32 + 4)  # layers, K and V, rows, heads
        assert cache.compression == pytest.approx(128 / 36)
    remove_kv(model)
    prepare_kv(model, KVCacheSection(format="int4", site="pre_rope"))
    with quantized_cache(model) as cache:
        decoded(model, cache)
        assert cache.nbytes == 2 * 2 * 2 * 2 * 21 * (32 + 4) + 2 * 21 * 64 * 4  # cos and sin, once for both layers


@pytest.mark.parametrize("format_", ["int8", "fp8_e4m3"])
@torch.no_grad()
def test_one_static_range(decoder: Decoder, format_: str) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(format=format_, range="static"))
    quantizers = [quantizer for _, quantizer in kv_quantizers(model)]
    for quantizer in quantizers:
        quantizer.observe()
    model(IDS)
    for quantizer in quantizers:
        quantizer.settle()
    with quantized_cache(model) as cache:
        assert torch.allclose(decoded(model, cache), model(IDS).logits, atol=1e-5)
        assert cache.nbytes == 2 * 2 * (2 * 2 * 21 * 16 + 4)


@pytest.mark.parametrize("name", ["before, per token", "int4 per head", "KIVI"])
@torch.no_grad()
def test_one_side_off(decoder: Decoder, name: str) -> None:
    for off in ("key", "value"):
        model = decoder("llama")
        prepare_kv(model, KVCacheSection(**SECTIONS[name]))
        for path, quantizer in kv_quantizers(model):
            quantizer.enabled = not path.endswith(off)
        with quantized_cache(model) as cache:
            assert torch.allclose(decoded(model, cache), model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox"])
@torch.no_grad()
def test_left_padding(decoder: Decoder, kind: str, name: str) -> None:
    """Each row's keys turn by its own positions."""
    model = decoder(kind)
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with quantized_cache(model) as cache:
        logits = decoded(model, cache, attention_mask=mask, position_ids=positions)
    assert torch.allclose(logits[mask.bool()], expected[mask.bool()], atol=1e-5)
    if name != "KIVI":  # whose groups of tokens count columns
        alone = model(IDS[:1, 6:]).logits
        assert torch.allclose(expected[:1, 6:], alone, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "sample", "several", "beam"],
)
def test_generate(decoder: Decoder, name: str, options: dict[str, Any]) -> None:
    """The same tokens as by the training graph from scratch at each step, with left padding."""
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(**SECTIONS[name]))
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    options = options | {"attention_mask": mask, "max_new_tokens": 12, "output_scores": True}
    torch.manual_seed(0)
    expected = model.generate(IDS, use_cache=False, return_dict_in_generate=True, **options)
    torch.manual_seed(0)
    with quantized_cache(model) as cache:
        found = model.generate(IDS, past_key_values=cache, return_dict_in_generate=True, **options)
        assert found.past_key_values is cache and cache.get_seq_length() >= 21
    assert torch.equal(found.sequences, expected.sequences)
    ours, theirs = torch.stack(found.scores), torch.stack(expected.scores)
    assert torch.allclose(ours, theirs, atol=1e-4)


@torch.no_grad()
def test_rows_and_rollback(decoder: Decoder) -> None:
    for name in ("before, per token", "int4 per head"):
        model = decoder("llama")
        prepare_kv(model, KVCacheSection(**SECTIONS[name]))
        expected = model(IDS).logits
        with quantized_cache(model) as cache:
            model(IDS[:, :15], past_key_values=cache)
            cache.crop(-5)
            assert cache.get_seq_length() == 10 and cache.is_croppable
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            logits = model(IDS[[1, 0], 10:], past_key_values=cache).logits
            assert torch.allclose(logits, expected[[1, 0], 10:], atol=1e-5)
            cache.reset()
            assert cache.get_seq_length() == cache.nbytes == 0
            assert torch.allclose(decoded(model, cache), expected, atol=1e-5)
            with pytest.raises(ModelError, match="minus the number"):
                cache.crop(5)


@torch.no_grad()
def test_codes_do_not_return_to_the_window(decoder: Decoder) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(format="int4", residual=8))
    with quantized_cache(model) as cache:
        assert not cache.is_croppable
        model(IDS[:, :8], past_key_values=cache)
        cache.crop(-3)
        rest = model(IDS[:, 5:], past_key_values=cache).logits
        assert torch.allclose(rest, model(IDS).logits[:, 5:], atol=1e-5)
        with pytest.raises(ModelError, match="cut from 21 tokens to 20"):
            cache.crop(-1)


@torch.no_grad()
def test_only_in_its_context(decoder: Decoder) -> None:
    model = decoder("llama")
    with pytest.raises(ModelError, match="0 of .* layers have quantizers") as caught, quantized_cache(model):
        pass
    assert caught.value.fix == "prepare_kv(model, section)"
    prepare_kv(model, KVCacheSection(format="int4"))
    expected = model(IDS).logits
    with quantized_cache(model) as cache:
        model(IDS, past_key_values=DynamicCache())
    with pytest.raises(ModelError, match="outside its context"):
        model(IDS, past_key_values=cache)
    assert torch.equal(model(IDS).logits, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_encoder_decoder_has_two_caches() -> None:
    config = BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    model = BartForConditionalGeneration(config)
    assert prepare_kv(model, KVCacheSection(format="int4")) == ["model.decoder.layers.0.self_attn"]
    assert model(IDS).logits.shape == (2, 21, 96)
    with pytest.raises(ModelError, match="BartAttention is of an encoder-decoder"):
        QuantizedCache(model)


@torch.no_grad()
def test_plain_cache(decoder: Decoder) -> None:
    """transformers' own cache holds full precision; attention still sees levels."""
    for name in ("before, per token", "int4 per head", "KIVI"):
        model = decoder("llama")
        prepare_kv(model, KVCacheSection(**SECTIONS[name]))
        assert torch.allclose(decoded(model, DynamicCache()), model(IDS).logits, atol=1e-5)  # type: ignore[arg-type]


@torch.no_grad()
def test_padding_decides_no_scale(decoder: Decoder) -> None:
    """A group of tokens that holds padding has the range of its real tokens."""
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(**SECTIONS["KIVI"]))
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    others = IDS.masked_fill(mask == 0, 95)
    first, second = (model(ids, attention_mask=mask, use_cache=False).logits for ids in (IDS, others))
    assert torch.equal(first[0, 6:], second[0, 6:]) and not torch.equal(first[0, :6], second[0, :6])


@torch.no_grad()
def test_another_rotation_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama")
    prepare_kv(model, KVCacheSection(site="pre_rope", format="int4"))
    with quantized_cache(model) as cache:
        layer = cache.coded[0]
        assert isinstance(layer, RotatedLayer)
        monkeypatch.setattr(layer.rotation, "apply", lambda q, k, cos, sin: (q, -k))
        with pytest.raises(ModelError, match="changes keys in another way than apply_rotary_pos_emb"):
            model(IDS, past_key_values=cache)
    monkeypatch.delattr(modeling_llama, "apply_rotary_pos_emb")
    with pytest.raises(ModelError, match="has no apply_rotary_pos_emb") as caught:
        QuantizedCache(model)
    assert caught.value.fix == "method.kv_cache.site=post_rope"
