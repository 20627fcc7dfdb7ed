"""The .gguf file: blocks by formulas written here, weights and logits by gguf's and transformers' own readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qtrain.errors import ExportError
from qtrain.export.gguf.blocks import SPECS, minimum_is_exact, pack_blocks, stored_record, unpack_blocks
from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.readback import differing_codes
from qtrain.export.gguf.trained import BLOCK_TYPES, Q4_0, Q4_1, Q8_0, TQ1_0, TQ2_0, BlockType, block_type
from qtrain.export.gguf.write import write
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.modules.deployed import DeployedModel
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]
WORDS = "The quick brown fox jumps over 12 lazy dogs"
GROUPS = {"granularity": "per_group", "group_size": 32}
WIDE = {"hidden_size": 256, "intermediate_size": 256}
# Options of the quantizers, the types that linear layers get, and more keys of the model.
CASES: dict[str, tuple[dict[str, Any], set[str], dict[str, Any]]] = {
    "w4": ({"format": "int4", **GROUPS, "range": "learned", "calibrate": "mse"}, {"Q4_0"}, {}),
    "w4-rows": ({"format": "int4", "granularity": "per_channel"}, {"Q4_0"}, {}),
    "w4-64": ({"format": "int4", "group_size": 64}, {"Q4_0"}, {}),
    "w8": ({"format": "int8", **GROUPS}, {"Q8_0"}, {}),
    "w8-rows": ({"format": "int8", "granularity": "per_channel"}, {"Q8_0"}, {}),
    "w5": ({"format": "int5", **GROUPS}, {"Q8_0"}, {}),
    "w3-asymmetric": ({"format": "int3", "symmetric": False, **GROUPS}, {"Q4_0"}, {}),
    "w4-asymmetric": ({"format": "int4", "symmetric": False, **GROUPS}, {"Q8_0"}, {}),
    "ternary": ({"format": "ternary", "granularity": "per_channel"}, {"TQ2_0"}, WIDE),
    "ternary-32": ({"format": "ternary", **GROUPS}, {"Q4_0"}, {}),
    "w2": ({"format": "int2", **GROUPS}, {"Q4_0"}, {}),
    "tied": ({"format": "int4", **GROUPS}, {"Q4_0"}, {"tie_word_embeddings": True}),
    "biased": ({"format": "int4", **GROUPS}, {"Q4_0"}, {"attention_bias": True, "mlp_bias": True}),
}


def trained(model: PreTrainedModel, weight: dict[str, Any], **keys: Any) -> DeployedModel:
    """Prepared, calibrated, and moved as training moves it."""
    method = build_method(QatOptions.model_validate({"name": "qat", "weight": weight, **keys}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    rows = [torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))]
    method.calibrate(model, rows, nullcontext, lambda items, total: items)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
    model.eval()
    return method.deployed(model, dtype=torch.float32)


def records(deployed: DeployedModel) -> Iterator[tuple[str, LinearRecord]]:
    for tensor in deployed.tensors():
        if tensor.record is not None:
            yield tensor.name.removesuffix(".weight"), tensor.record()


def export(deployed: DeployedModel, directory: Path, tokenizer: Any = None, **keys: Any) -> dict[str, Any]:
    return write(deployed, GgufOptions(format="gguf", **keys), directory, tokenizer=tokenizer, facts={"name": "tiny"})


def loaded(directory: Path, **keys: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32, **keys).eval()


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_with_the_trained_weights(
    tmp_path: Path, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    weight, types, keys = CASES[name]
    model = tiny_model(**{"initializer_range": 0.1, "tie_word_embeddings": False, **keys})
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    deployed = trained(model, weight)
    result = export(deployed, tmp_path / "out", tiny_tokenizer)
    assert result["lossy"] == [] and result["codes"] == "as trained" and result["quantized_layers"] == 14
    assert set(result["types"]) == types | {"F32"}
    # Every weight, bit by bit, through the loader's own dequantization, RoPE order and names.
    # transformers builds Llama models without biases, whatever the file holds.
    plain = loaded(tmp_path / "out", **({"config": LlamaConfig(**model.config.to_dict())} if name == "biased" else {}))
    for module, record in records(deployed):
        assert torch.equal(plain.get_submodule(module).weight, record.dequantize()), module
    others = {tensor.name: tensor.value() for tensor in deployed.tensors() if not tensor.linear}
    state = plain.state_dict()
    assert len(others) >= 6 and all(torch.equal(state[key], value) for key, value in others.items())
    ids = torch.tensor([tiny_tokenizer(WORDS)["input_ids"]])
    with torch.no_grad():
        expected, found = model(ids).logits, plain(ids).logits
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 3, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    # Our reader finds what was trained, in the type that the plan says.
    counts = differing_codes(tmp_path / "out" / "model.gguf", records(deployed))
    assert len(counts) == 14 and set(counts.values()) == {0}


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_load_as_what_they_are(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, family: str, heads: tuple[int, int]
) -> None:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=512,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    model = model_class(config)
    for key, parameter in model.named_parameters():
        if key.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5)
    deployed = trained(model, {"format": "int4", **GROUPS})
    export(deployed, tmp_path / "out", tiny_tokenizer)
    plain, ids = loaded(tmp_path / "out"), torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, plain(ids).logits
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert plain.config.max_position_embeddings == 256 and plain.config.rms_norm_eps == pytest.approx(1e-5)
    assert set(differing_codes(tmp_path / "out" / "model.gguf", records(deployed)).values()) == {0}


def random_record(spec: QuantSpec, rows: int, width: int, seed: int) -> LinearRecord:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    qparams = choose_qparams(weight, spec)
    return LinearRecord(quantize(weight, qparams, spec), *qparams, spec)


def formula(packed: np.ndarray, kind: BlockType) -> np.ndarray:
    """w of one block, from its bytes, one weight after the other (ggml-quants.c's layouts)."""
    half = lambda at: float(packed[at : at + 2].copy().view(np.float16)[0])  # noqa: E731
    if kind is Q4_0:
        return np.array([half(0) * ((int(packed[2 + i % 16]) >> (4 * (i // 16)) & 15) - 8) for i in range(32)])
    if kind is Q4_1:
        return np.array([half(0) * (int(packed[4 + i % 16]) >> (4 * (i // 16)) & 15) + half(2) for i in range(32)])
    if kind is Q8_0:
        return np.array([half(0) * int(packed[2 + i].view(np.int8)) for i in range(32)])
    if kind is TQ2_0:
        at = [(i // 128 * 32 + i % 32, i % 128 // 32) for i in range(256)]
        return np.array([half(64) * ((int(packed[byte]) >> (2 * place) & 3) - 1) for byte, place in at])
    found = []
    for start, count, weights in ((0, 32, 160), (32, 16, 80), (48, 4, 16)):
        for i in range(weights):
            digit = (int(packed[start + i % count]) * 3 ** (i // count) % 256) * 3 // 256
            found.append(half(52) * (digit - 1))
    return np.array(found)


SPEC_OF_TYPE = {
    "Q4_0": QuantSpec(full_range=True),
    "Q4_1": QuantSpec(symmetric=False),
    "Q8_0": QuantSpec(format="int8", full_range=True),
    "TQ1_0": QuantSpec(format="ternary", group_size=256),
    "TQ2_0": QuantSpec(format="ternary", group_size=256),
}


@pytest.mark.parametrize("name", SPEC_OF_TYPE)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_blocks_hold_what_ggmls_formulas_say(name: str, rows: int, blocks: int, seed: int) -> None:
    kind, spec = BLOCK_TYPES[name], SPEC_OF_TYPE[name]
    record = random_record(spec, rows, blocks * kind.size, seed)
    if kind is Q4_1:  # scales of few digits, so that fp16 holds the minimum
        coarse = torch.exp2(record.scale.float().log2().round()).half()
        record = LinearRecord(record.codes, coarse, record.zero_point, spec)
        assert minimum_is_exact(record)
    stored = stored_record(record, kind)
    packed = pack_blocks(stored, kind)
    size = packed.shape[1] // blocks
    by_hand = np.stack([formula(block, kind) for block in packed.numpy().reshape(-1, size)]).reshape(rows, -1)
    expected = record.dequantize()
    assert np.array_equal(by_hand.astype(np.float32), expected.numpy())
    assert np.array_equal(dequantize(packed.numpy(), name_of(kind)), expected.numpy())
    back = unpack_blocks(packed, kind)
    assert torch.equal(back.codes, stored.codes) and torch.equal(back.scale, stored.scale)
    assert (back.zero_point is None) == (stored.zero_point is None)
    assert back.zero_point is None or torch.equal(back.zero_point, stored.zero_point)
    assert torch.equal(back.dequantize(), expected) and back.spec == SPECS[name]


def name_of(kind: BlockType) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.name]


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["int2", "int3", "int4", "int5", "int6", "int7", "int8", "ternary", "binary"]),
    symmetric=st.booleans(),
    full_range=st.booleans(),
    group=st.sampled_from([32, 64, 96, 256, None]),
    scale_dtype=st.sampled_from(["fp16", "bf16"]),
    ternary=st.sampled_from([TQ1_0, TQ2_0]),
    seed=st.integers(0, 10**6),
)
def test_every_spec_with_a_place_keeps_every_bit(
    form: str, symmetric: bool, full_range: bool, group: int | None, scale_dtype: Any, ternary: BlockType, seed: int
) -> None:
    integer = form.startswith("int")
    spec = QuantSpec(
        format=form,
        symmetric=symmetric or not integer,
        full_range=full_range and integer,
        granularity="per_group" if group else "per_channel",
        group_size=group,
        scale_dtype=scale_dtype,
    )
    kind = block_type(spec, 768, ternary)
    if form == "int8" and not spec.symmetric:
        assert kind is None  # levels from -255 to 255
        return
    assert kind is not None
    record = random_record(spec, 3, 768, seed)
    packed = pack_blocks(stored_record(record, kind), kind)
    assert np.array_equal(dequantize(packed.numpy(), name_of(kind)), record.dequantize().numpy())
    assert torch.equal(unpack_blocks(packed, kind).dequantize(), record.dequantize())


def test_fp16_scales_alone_are_held() -> None:
    spec = QuantSpec(scale_dtype="fp32")
    record = random_record(spec, 2, 64, 0)
    with pytest.raises(ExportError, match="no fp16 numbers"):
        stored_record(record, Q4_0)
    with pytest.raises(ExportError, match="levels from"):
        stored_record(random_record(QuantSpec(format="int8"), 2, 64, 0), Q4_0)
