"""What quantization-aware training swaps, trains, measures against, saves and deploys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.errors import ModelError
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules.kv.prepare import kv_quantizers
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import quantizers
from qtrain.numerics.affine import choose_qparams, dequantize, quantize

CPU = torch.device("cpu")
LEARNED = {"format": "int4", "range": "learned", "calibrate": "mse"}
W4 = {"weight": {"format": "int4", "group_size": 32}}
W4A8KV4 = {
    "weight": LEARNED,
    "activation": {"format": "int8"},
    "kv_cache": {"format": "int4", "symmetric": False, "site": "pre_rope", "share": "per_token"},
}
EVERYTHING = {
    **W4A8KV4,
    "activation": {"format": "int8", "range": "static", "calibrate": "kl"},
    "embedding": LEARNED,
    "head": True,
}
Prepare = Callable[..., tuple[Qat, LlamaForCausalLM]]


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
    )


def rows(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (1, 24), generator=generator) for _ in range(count)]


@pytest.fixture
def prepare() -> Prepare:
    """A tiny Llama, prepared and calibrated; ``stir`` moves all that trains, as training does."""

    def call(
        *, stir: bool = False, tied: bool = False, calibrated: bool = True, **keys: Any
    ) -> tuple[Qat, LlamaForCausalLM]:
        method = build_method(QatOptions.model_validate({"name": "qat", **keys}))
        assert isinstance(method, Qat)
        model = method.prepare(tiny(tied), compute_dtype=torch.float32, device=CPU)
        assert isinstance(model, LlamaForCausalLM)
        if calibrated:
            method.calibrate(model, rows(), nullcontext, lambda items, total: items)
        if stir:
            torch.manual_seed(7)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and name.endswith(("scale", "offset")):
                        parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
                    elif parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return method, model.eval()

    return call


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=rows(1)[0]).logits
    return result


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def formats(model: nn.Module) -> dict[str, str]:
    return {
        name: layer.weight_quantizer.spec.format
        for name, layer in layers(model).items()
        if layer.weight_quantizer is not None
    }


def test_linears_are_on_their_levels_and_the_rest_is_as_it_was(prepare: Prepare) -> None:
    plain = tiny().eval()
    _, model = prepare(**W4)
    assert len(layers(model)) == 14 and "lm_head" not in layers(model)
    by_hand = copy.deepcopy(plain)
    for name, layer in layers(model).items():
        weight, spec = plain.get_submodule(name).weight, layer.weight_quantizer.spec  # type: ignore[union-attr]
        qparams = choose_qparams(weight, spec)
        by_hand.get_submodule(name).weight.data = dequantize(quantize(weight, qparams, spec), qparams, spec)
    assert torch.equal(logits(model), logits(by_hand))
    assert not torch.equal(logits(model), logits(plain))


def test_all_weights_train_in_fp32_whatever_they_were_stored_in() -> None:
    method = build_method(QatOptions.model_validate({"name": "qat", **W4A8KV4}))
    model = method.prepare(tiny().to(torch.bfloat16), compute_dtype=torch.bfloat16, device=CPU)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_base_that_adapters_freeze_stays_as_it_was_stored() -> None:
    method = build_method(QatOptions.model_validate({"name": "qat", "weight": LEARNED, "lora": {"r": 4}}))
    model = method.prepare(tiny().to(torch.bfloat16), compute_dtype=torch.bfloat16, device=CPU)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=rows(1)[0], labels=rows(1)[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_w4a8kv4_reaches_weights_inputs_keys_and_values(prepare: Prepare) -> None:
    _, model = prepare(**W4A8KV4)
    for layer in layers(model).values():
        assert layer.weight_quantizer is not None and layer.input_quantizer is not None
        assert layer.weight_quantizer.range_tensors()[0].shape == (layer.out_features, 1)  # type: ignore[union-attr]
    caches = dict(kv_quantizers(model))
    assert len(caches) == 2 * 2
    assert all(quantizer.spec.format == "int4" and not quantizer.spec.symmetric for quantizer in caches.values())
    without = prepare(**{**W4A8KV4, "kv_cache": None})[1]
    assert not torch.equal(logits(model), logits(without))


def test_gradients_reach_weights_and_ranges(prepare: Prepare) -> None:
    _, model = prepare(**EVERYTHING)
    model.train()
    model(input_ids=rows(1)[0], labels=rows(1)[0]).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum())]
    assert not missing


def test_ranges_have_their_own_rate_and_no_decay(prepare: Prepare) -> None:
    method, model = prepare(**W4A8KV4, scale_lr=1e-3)
    weights, ranges = method.parameter_groups(model, 5e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (weights["lr"], ranges["lr"], ranges["weight_decay"]) == (5e-5, 1e-3, 0.0)
    assert len(ranges["params"]) == 14 and all(names[id(p)].endswith(".scale") for p in ranges["params"])
    both = [id(parameter) for parameter in (*weights["params"], *ranges["params"])]
    assert len(both) == len(set(both)) and set(both) == set(names)
    assert method.parameter_groups(prepare(**W4A8KV4)[1], 5e-5)[1]["lr"] == 1e-3
    assert len(build_method(QatOptions(name="qat")).parameter_groups(prepare(**W4)[1], 5e-5)) == 1


def test_calibration_weighs_the_search_by_what_flows_in(prepare: Prepare) -> None:
    plain, weighted = prepare(weight=LEARNED, calibrated=False)[1], prepare(weight=LEARNED)[1]
    inputs: dict[str, Tensor] = {}
    full = tiny().eval().requires_grad_(False)
    for name in layers(plain):
        full.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))
        )
    full(torch.cat(rows()))
    for name, layer in layers(plain).items():
        weight = layer.weight.detach()
        errors = [
            float((inputs[name].square().mean(0) * (it.quantized_weight().detach() - weight).square()).sum())
            for it in (layer, layers(weighted)[name])
        ]
        assert errors[1] <= errors[0] * (1 + 1e-4), name
    assert any(
        not torch.equal(layer.weight_quantizer.scale, layers(weighted)[name].weight_quantizer.scale)  # type: ignore
        for name, layer in layers(plain).items()
    )


def test_static_ranges_come_from_the_rows(prepare: Prepare) -> None:
    _, model = prepare(weight=None, activation={"format": "int8", "range": "static"})
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        for ids in rows():
            model(ids)
    assert layer.input_quantizer is not None and layer.input_quantizer.scale is not None
    assert float(layer.input_quantizer.scale) * 127 == pytest.approx(float(max(seen)), rel=1e-6)
    assert layer.weight_quantizer is None


def test_the_baselines_are_full_precision_and_rounding_to_nearest(prepare: Prepare) -> None:
    method, model = prepare(**EVERYTHING)
    entered = method.baselines(model)
    trained = logits(model)
    with entered["full"]():
        assert torch.allclose(logits(model), logits(tiny().eval()), atol=1e-5)
    tokens, rows_of = {"format": "int8", "granularity": "per_tensor"}, {"format": "int4"}
    dynamic = {**EVERYTHING, "weight": rows_of, "embedding": rows_of, "activation": tokens}
    with entered["ptq"]():
        assert torch.equal(logits(model), logits(prepare(**dynamic)[1]))
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("keys", [W4, W4A8KV4, EVERYTHING, {**W4A8KV4, "lora": {"r": 4}}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_restored(keys: dict[str, Any], tied: bool, prepare: Prepare, tmp_path: Path) -> None:
    method, model = prepare(stir=True, tied=tied, **keys)
    method.save(model, tmp_path / "weights")
    fresh_method, fresh = prepare(tied=tied, calibrated=False, **keys)
    fresh_method.restore(fresh, tmp_path / "weights")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"weight": {"format": "int4"}}, "scale"),
        ({"weight": {**LEARNED, "group_size": 32}}, "scale"),
        ({"weight": {**LEARNED, "format": "int3"}}, "int3"),
        ({**W4A8KV4, "activation": {"format": "int8", "symmetric": False}}, "input_quantizer"),
    ],
)
def test_weights_of_another_spec_are_refused(
    keys: dict[str, Any], named: str, prepare: Prepare, tmp_path: Path
) -> None:
    method, model = prepare(weight=LEARNED)
    method.save(model, tmp_path / "weights")
    other_method, other = prepare(**keys)
    before = logits(other)
    with pytest.raises(ModelError, match="do not fit") as caught:
        other_method.restore(other, tmp_path / "weights")
    assert named in str(caught.value) and str(tmp_path / "weights") in str(caught.value)
    assert torch.equal(logits(other), before)


def deployed(method: Qat, model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A plain Llama with the deployed tensors, and those by name."""
    described = method.deployed(model, dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in described.tensors()}
    assert all(tuple(tensor.value().shape) == tensor.shape for tensor in tensors.values())
    plain = LlamaForCausalLM(described.config).eval()
    missing = plain.load_state_dict({name: tensor.value() for name, tensor in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if described.config.tie_word_embeddings else [])
    plain.tie_weights()
    return plain, tensors


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 8}])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_deployed_is_what_was_trained(lora: dict[str, Any] | None, tied: bool, prepare: Prepare) -> None:
    method, model = prepare(stir=True, tied=tied, weight={**LEARNED, "group_size": 32}, lora=lora)
    plain, tensors = deployed(method, model)
    assert torch.equal(logits(plain), logits(model))
    for name, layer in layers(model).items():
        tensor = tensors[f"{name}.weight"]
        codes, qparams = layer.codes()
        record = tensor.record()
        assert torch.equal(record.codes, codes) and torch.equal(record.scale, qparams.scale)
        assert torch.equal(record.dequantize(), tensor.value())
        assert tensor.linear and tensor.spec == record.spec == layer.weight_quantizer.spec  # type: ignore[union-attr]
    assert sum(tensor.spec is not None for tensor in tensors.values()) == 14


def test_deployed_tensors_name_what_their_inputs_were(prepare: Prepare) -> None:
    method, model = prepare(**EVERYTHING)
    _, tensors = deployed(method, model)
    specs = {tensor.activation for tensor in tensors.values() if tensor.linear}
    assert len(specs) == 1 and next(iter(specs)) == layers(model)["lm_head"].input_quantizer.spec  # type: ignore
    assert not any("quantizer" in name for name in tensors)
    for name in ("lm_head", "model.embed_tokens"):  # on their levels, in no format of their own
        assert tensors[f"{name}.weight"].spec is None and not tensors[f"{name}.weight"].linear
        assert torch.equal(tensors[f"{name}.weight"].value(), model.get_submodule(name).quantized_weight())


def test_adapters_train_inside_the_quantizer(prepare: Prepare, tmp_path: Path) -> None:
    """fq(W + (lora_alpha / r) B A): the codes of the sum."""
    method, model = prepare(stir=True, weight=LEARNED, lora={"r": 4, "lora_alpha": 8})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B", "quantizer.scale"))}
    assert len(trained) == 3 * 14
    layer = layers(model)["model.layers.1.mlp.down_proj"]
    assert layer.lora_A is not None and layer.lora_B is not None and layer.weight_quantizer is not None
    merged = layer.weight + 2.0 * layer.lora_B @ layer.lora_A
    on_levels = layer.weight_quantizer(merged)
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), x @ on_levels.t())
    assert not torch.equal(on_levels, layer.weight_quantizer(layer.weight))
    method.save(model, tmp_path / "weights")
    assert load_file(tmp_path / "weights" / "model.safetensors").keys() == trained  # the base is model.path's
    fresh = prepare(weight=LEARNED, lora={"r": 4})[1]
    assert torch.equal(logits(fresh), logits(prepare(weight=LEARNED)[1]))  # B begins at 0


def test_rules_skips_and_ends(prepare: Prepare) -> None:
    rules = {"*.down_proj": {"weight": {"format": "int8"}}, "*.1.mlp.down_proj": {"weight": {"group_size": 64}}}
    _, model = prepare(weight={"format": "int4", "group_size": 32}, rules=rules, skip=["*.k_proj"], first_last="int8")
    found = formats(model)
    assert len(found) == 12 and not any("k_proj" in name for name in found)
    eight = {name for name, format in found.items() if format == "int8"}
    assert eight == {f"model.layers.{n}.mlp.down_proj" for n in range(2)} | {"model.layers.0.self_attn.q_proj"}
    specs = {n: layers(model)[f"model.layers.{n}.mlp.down_proj"].weight_quantizer.spec for n in range(2)}  # type: ignore
    assert (specs[0].group_size, specs[1].group_size) == (32, 64)


def test_a_rule_may_leave_inputs_as_they_are(prepare: Prepare) -> None:
    _, model = prepare(weight=LEARNED, activation={"format": "int8"}, rules={"*.down_proj": {"activation": None}})
    plain = {name for name, layer in layers(model).items() if layer.input_quantizer is None}
    assert plain == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}


def test_patterns_that_match_nothing_are_refused(prepare: Prepare) -> None:
    for keys in ({"skip": ["k_proj"]}, {"rules": {"k_proj": {"weight": {"format": "int8"}}}}):
        with pytest.raises(ModelError, match=r"'k_proj' matches no layer.*\n.*\n.*'\*.k_proj'"):
            prepare(**W4, **keys)


def test_tied_embedding_and_head_share_one_set_of_codes(prepare: Prepare) -> None:
    int8 = {"format": "int8", "range": "learned"}
    method, model = prepare(stir=True, tied=True, weight=int8, embedding=int8, head=True)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantEmbedding) and isinstance(model.lm_head, QuantLinear)
    assert embedding.weight is model.lm_head.weight
    assert embedding.weight_quantizer is model.lm_head.weight_quantizer
    assert len(method.parameter_groups(model, 1e-4)[1]["params"]) == 14 + 1
    plain, tensors = deployed(method, model)
    assert "lm_head.weight" not in tensors and plain.config.tie_word_embeddings
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("keys", [{"head": True}, {"embedding": {"format": "int8"}}], ids=["head", "embedding"])
def test_one_of_two_that_were_tied_gets_a_weight_of_its_own(keys: dict[str, Any], prepare: Prepare) -> None:
    method, model = prepare(stir=True, tied=True, **W4, **keys)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert any("untied" in line for line in method.lines(model))
    plain, tensors = deployed(method, model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys()
    assert not plain.config.tie_word_embeddings
    assert torch.equal(logits(plain), logits(model))


def test_lines_say_what_became_what(prepare: Prepare) -> None:
    method, model = prepare(**W4A8KV4)
    ranges = sum(q.scale.numel() for _, q in quantizers(model) if q.learns and q.scale is not None)
    assert method.lines(model) == [
        "weights     int4 symmetric, per_channel, learned",
        "inputs      int8 symmetric, per_token, dynamic",
        "quantized   14 layers, 2 stay as they are",
        "KV cache    int4 asymmetric, per_token, pre_rope, 2 layers",
        "kernels     simulated products (method.kernels=int8 multiplies bytes in 14 layers); "
        "levels by plain PyTorch: one-pass kernels need a GPU",
        f"trained     {sum(p.numel() for p in model.parameters()):,} parameters, {ranges:,} of them ranges",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": None}, "nothing is quantized"),
        ({"weight": None, "activation": {}, "lora": {}}, "method.lora trains inside"),
        ({"first_last": "int9"}, "did you mean"),
        ({"bits_schedule": {0: "int8", 10: "int6"}}, "ends with int6"),
        ({"bits_schedule": {0: "ternary"}}, "among int8 .. int2"),
        ({"bits_schedule": {-1: "int4"}}, "steps count from 0"),
    ],
)
def test_options_that_contradict_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QatOptions.model_validate({"name": "qat", **keys})


def test_widths_that_no_group_divides_are_refused(prepare: Prepare) -> None:
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj: .*group_size=48\n.*\n.*group_size=32"):
        prepare(weight={"format": "int4", "group_size": 48})
