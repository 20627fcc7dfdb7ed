"""The .gguf file: blocks by formulas written here, weights and logits by gguf's and transformers' own readers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
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
from qtrain.export.gguf.check import differences
from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.readback import differing_codes, read_records
from qtrain.export.gguf.trained import BLOCK_TYPES, Q4_0, Q4_1, Q8_0, TQ1_0, TQ2_0, BlockType, block_type
from qtrain.export.gguf.write import write
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.models.config import ModelSection
from qtrain.models.load import load_model, load_tokenizer
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.registry import resolve

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


LSQ = {"format": "int4", **GROUPS}
INT8 = {"format": "int8", "convention": "compressed-tensors"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "small groups": ({"format": "int4", "group_size": 16}, {}, "per_group(16)", "method.weight.group_size=32"),
    "int8 asymmetric": (
        {"format": "int8", "symmetric": False},
        {},
        "int8 asymmetric",
        "method.weight.symmetric=true",
    ),
    "mid_rise": ({"format": "int2", "mid_rise": True, **GROUPS}, {}, "half-integer", "method.weight.mid_rise=false"),
    "fp8": ({"format": "fp8_e4m3"}, {}, "fp8_e4m3", "method.weight.format=int8"),
    "inputs": (LSQ, {"activation": INT8}, "int8 symmetric per_token inputs", "method.activation=null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_block_holds_is_refused_with_the_way_out_or_rounded_again_when_asked(
    tmp_path: Path, tiny_model: Build, name: str
) -> None:
    weight, keys, what, fix = REFUSED[name]
    options = QatOptions.model_validate({"name": "qat", "weight": weight, **keys})
    with pytest.raises(ExportError) as early:
        GgufOptions(format="gguf").check_trained(options.trained_layers())
    deployed = trained(tiny_model(initializer_range=0.1), weight, **keys)
    with pytest.raises(ExportError) as caught:
        export(deployed, tmp_path / "out")
    for message in (str(early.value), str(caught.value)):
        assert what in message and fix in message and "export.format=merged" in message
        assert "export.allow_requantize=true" in message
    assert list(tmp_path.iterdir()) == []
    # Asked for, it is done, and the result says what it is.
    asked = GgufOptions(format="gguf", allow_requantize=True)
    asked.check_trained(options.trained_layers())
    result = write(deployed, asked, tmp_path / "out", tokenizer=None, facts={})
    if name == "inputs":
        assert result["lossy"] == [] and any("blocks of 32" in note for note in result["notes"])
        assert set(differing_codes(tmp_path / "out" / "model.gguf", records(deployed)).values()) == {0}
        return
    assert len(result["lossy"]) == 14 and result["codes"] == "lossy"
    assert any("lossy: 14 layers" in note for note in result["notes"])
    assert "lossy: 14 layers" in (tmp_path / "out" / "README.md").read_text()
    for tensor in deployed.tensors():
        if tensor.linear:
            found, levels = weights_of(tmp_path / "out")[tensor.name], tensor.value()
            error = float((found - levels).norm() / levels.norm())
            assert 0 < error < (0.2 if tensor.spec is not None and tensor.spec.bits <= 4 else 0.05)


def weights_of(directory: Path) -> dict[str, Tensor]:
    return loaded(directory).state_dict()


def test_a_way_out_is_one(tiny_model: Build, tmp_path: Path) -> None:
    changes = {"small groups": {"group_size": 32}, "int8 asymmetric": {"symmetric": True}}
    changes |= {"mid_rise": {"mid_rise": False}, "fp8": {"format": "int8"}}
    for name, change in changes.items():
        weight = {**REFUSED[name][0], **change}
        result = export(trained(tiny_model(), weight), tmp_path / name)
        assert result["lossy"] == []


def test_q4_1_where_its_minimum_is_exact(tmp_path: Path, tiny_model: Build) -> None:
    """Scales that are powers of two leave room for the minimum; a single other one, and the layer is in Q8_0."""
    deployed = trained(tiny_model(initializer_range=0.1), {"format": "int4", "symmetric": False, **GROUPS})
    spoiled = "model.layers.0.self_attn.k_proj"

    def coarse(name: str, record: LinearRecord) -> LinearRecord:
        scale = torch.exp2(record.scale.float().log2().round()).half()
        zero = record.zero_point
        assert zero is not None
        if name == spoiled:
            scale[3, 1], zero = 0.0321, zero.clone()
            zero[3, 1] = 5
        return LinearRecord(record.codes, scale, zero, record.spec)

    def tensors() -> Iterator[DeployedTensor]:
        for tensor in deployed.tensors():
            name = tensor.name.removesuffix(".weight")
            computes = tensor.record
            given = None if computes is None else lambda name=name, computes=computes: coarse(name, computes())
            yield replace(tensor, record=given)

    changed = replace(deployed, tensors=tensors)
    result = export(changed, tmp_path / "out")
    assert result["types"] == {"F32": 7, "Q4_1": 13, "Q8_0": 1}
    assert any("1 layers are in Q8_0" in note for note in result["notes"])
    path = tmp_path / "out" / "model.gguf"
    assert set(differing_codes(path, records(changed)).values()) == {0}
    assert dict(read_records(path))["model.layers.1.mlp.up_proj"].zero_point is not None
    weights = weights_of(tmp_path / "out")
    for name, record in records(changed):
        assert torch.equal(weights[f"{name}.weight"], record.dequantize())


@pytest.mark.parametrize(
    ("quantize", "dtype", "types"),
    [
        ("none", torch.float32, {"F32": 21}),
        ("none", torch.bfloat16, {"BF16": 16, "F32": 5}),
        ("none", torch.float16, {"F16": 16, "F32": 5}),
        ("q8_0", torch.bfloat16, {"Q8_0": 14, "BF16": 2, "F32": 5}),
        ("q4_0", torch.float32, {"Q4_0": 14, "F32": 7}),
    ],
)
def test_merged_models(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, quantize: Any, dtype: torch.dtype, types: dict[str, int]
) -> None:
    deployed = replace(deploy(tiny_model(tie_word_embeddings=False)), dtype=dtype)
    result = export(deployed, tmp_path / "out", quantize=quantize)
    assert result["types"] == types and result["codes"] == quantize
    found = weights_of(tmp_path / "out")
    for tensor in deployed.tensors():
        stored = tensor.value() if len(tensor.shape) == 1 else tensor.value().to(dtype).float()
        if tensor.linear and quantize != "none":
            error = float((found[tensor.name] - tensor.value()).norm() / tensor.value().norm())
            assert error < (0.01 if quantize == "q8_0" else 0.12)
        else:
            assert torch.equal(found[tensor.name], stored)


def test_rows_that_are_no_whole_blocks(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 100}
    with pytest.raises(ExportError, match="down_proj.weight: no place for rows of 100 weights"):
        export(trained(tiny_model(**shape), {"format": "int4", "granularity": "per_channel"}), tmp_path / "out")
    result = export(deploy(tiny_model(**shape)), tmp_path / "out", quantize="q8_0")
    assert result["quantized_layers"] == 12 and any("2 layers are no whole blocks" in x for x in result["notes"])


def test_llama_3s_rope_is_in_the_file(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model(head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 64})
    result = export(deploy(model), tmp_path / "out")
    assert any("llama3" in note for note in result["notes"])
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    factors = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 5e5 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    divided = (plain / torch.from_numpy(factors.data.copy()).double()).float()
    torch.testing.assert_close(divided, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert len({round(float(factor), 3) for factor in factors.data}) > 3


@pytest.mark.parametrize(("keys", "what"), [({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({}, "rope_type='dynamic'")])
def test_models_that_llama_cpp_computes_otherwise(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, keys: dict[str, Any], what: str
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ExportError, match=what):
        export(deploy(tiny_model(**(keys or {"rope_parameters": rope}))), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused_by_name(tmp_path: Path, deploy: Deploy) -> None:
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(ExportError, match="model_type='gpt_neox'.*\n.*llama, mistral, qwen2"):
        export(deploy(model), tmp_path / "out")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model = tiny_model()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ExportError, match="model.norm.weight: NaN or inf"):
        export(deploy(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_computed_weights_are_let_go(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    plain = deploy(tiny_model(num_hidden_layers=6))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(value: Callable[[], Tensor]) -> Tensor:
        nonlocal most
        computed = value().clone()
        alive.append(weakref.ref(computed))
        most = max(most, sum(ref() is not None for ref in alive))
        return computed

    def tensors() -> Iterator[DeployedTensor]:
        for tensor in plain.tensors():
            yield replace(tensor, value=lambda tensor=tensor: counted(tensor.value))

    result = export(replace(plain, tensors=tensors), tmp_path / "out")
    assert len(alive) == sum(result["types"].values()) and most <= 2


MUTANTS: dict[str, tuple[str, int, int]] = {
    # tensor, byte of its data, bits to turn
    "low nibble": ("blk.0.ffn_up.weight", 2, 0x01),
    "high nibble": ("blk.1.attn_v.weight", 17, 0x80),
    "scale": ("blk.0.attn_k.weight", 0, 0x01),
    "permuted rows": ("blk.0.attn_q.weight", 18 * 2 * 5 + 3, 0x10),
    "last byte": ("blk.1.ffn_down.weight", -1, 0x40),
    "norm": ("blk.1.attn_norm.weight", 8, 0x01),
    "embedding": ("token_embd.weight", 5, 0x01),
    "head": ("output.weight", -4, 0x01),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_turned_bit_is_found(
    tmp_path: Path, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    deployed = trained(tiny_model(), LSQ)
    export(deployed, tmp_path / "out", tiny_tokenizer)
    path = tmp_path / "out" / "model.gguf"
    assert list(differences(path, deployed, tiny_tokenizer)) == []
    tensor, at, bits = MUTANTS[name]
    place = next(found for found in GGUFReader(path).tensors if found.name == tensor)
    content = bytearray(path.read_bytes())
    content[int(place.data_offset) + at % int(place.n_bytes)] ^= bits
    path.write_bytes(content)
    counts = [count for count in differing_codes(path, records(deployed)).values() if count]
    assert counts == ([] if name in ("norm", "embedding", "head") else [32] if name == "scale" else [1])
    (problem,) = differences(path, deployed, tiny_tokenizer)
    assert (
        problem.where is not None
        and problem.where.endswith(".weight")
        and problem.what[0] == str(max(counts or [1]))[0]
    )


KEYS = {
    "llama.feed_forward_length": {"intermediate_size": 96},
    "llama.rope.freq_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "llama.attention.layer_norm_rms_epsilon": {"rms_norm_eps": 1e-3},
    "llama.context_length": {"max_position_embeddings": 64},
}


@pytest.mark.parametrize("key", KEYS)
def test_another_key_is_found(tmp_path: Path, tiny_model: Build, deploy: Deploy, key: str) -> None:
    plain = deploy(tiny_model())
    export(plain, tmp_path / "out")
    other = replace(plain, config=LlamaConfig(**{**plain.config.to_dict(), **KEYS[key]}))
    assert [problem.where for problem in differences(tmp_path / "out" / "model.gguf", other, None)] == [key]


def test_another_tokenizer_is_found(
    tmp_path: Path, tiny_model: Build, deploy: Deploy, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, other = deploy(tiny_model()), deepcopy(tiny_tokenizer)
    export(plain, tmp_path / "out", tiny_tokenizer)
    other.chat_template, other.eos_token = "{{ messages }}", "<|endoftext|>"
    other.add_tokens(["<tool>"])
    found = {problem.where for problem in differences(tmp_path / "out" / "model.gguf", plain, other)}
    names = {"tokenizer.chat_template", "tokenizer.ggml.eos_token_id"}
    assert found == names | {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}


def test_a_short_file_is_no_file(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    export(deploy(tiny_model()), tmp_path / "out", quantize="q4_0")
    path = tmp_path / "out" / "model.gguf"
    assert len(dict(read_records(path))) == 14
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match="no whole GGUF file"):
        dict(read_records(path))


def test_the_directory_is_a_model(tmp_path: Path, tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    deployed = trained(model, LSQ)
    result = export(deployed, tmp_path / "out", tiny_tokenizer)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md"}
    assert result["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    section = ModelSection(path=str(tmp_path / "out"))
    ids = torch.tensor([load_tokenizer(section)(WORDS)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(section, torch.float32)(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


def test_the_config_names_its_writer() -> None:
    assert resolve(GgufOptions.implementation) is write
