"""What QLoRA freezes, trains, saves and deploys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.errors import ModelError
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.methods.qlora.layers import target_names
from qtrain.methods.qlora.method import QLora
from qtrain.modules.frozen_linear import dense_weight

CPU = torch.device("cpu")
BASES = ["nf4", "fp4", "int8", "none"]
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21, transformers 5.23
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),  # once for each int8 product
]

Prepare = Callable[..., tuple[QLora, PeftModel]]


@pytest.fixture
def prepare(tiny_llama_dir: Path) -> Prepare:
    """A fresh tiny Llama, prepared; ``stir`` moves B (and DoRA's magnitudes) off their start, as training does."""

    def call(*, stir: bool = False, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[QLora, PeftModel]:
        base = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=dtype)
        method = build_method(QLoraOptions(**{"r": 4, **keys}))
        assert isinstance(method, QLora)
        torch.manual_seed(5)
        model = method.prepare(base, compute_dtype=torch.float32, device=CPU)
        if stir:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
                    elif "magnitude" in name:
                        parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25))
        return method, model.eval()

    return call


def adapters(model: PeftModel) -> dict[str, LoraLayer]:
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert found
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(5, 37)[None]).logits
    return result


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapters_train_and_the_rest_keeps_its_dtype(base: str, dtype: torch.dtype, prepare: Prepare) -> None:
    _, model = prepare(base=base, dtype=dtype)
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {name for name in parameters if ".lora_A." in name or ".lora_B." in name}
    assert len(trained) == 2 * 14
    assert {parameters[name].dtype for name in trained} == {torch.float32}
    rest = {
        name: p.dtype for name, p in parameters.items() if "embed_tokens" in name or "norm" in name or "head" in name
    }
    assert len(rest) == 1 + 2 * 2 + 1 + 1
    assert set(rest.values()) == {dtype}


@pytest.mark.parametrize("base", BASES)
def test_the_adapters_start_changes_nothing(base: str, prepare: Prepare) -> None:
    _, model = prepare(base=base)
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(logits(model), without)


def test_every_base_is_another_model_near_the_first(prepare: Prepare, tiny_llama: LlamaForCausalLM) -> None:
    plain = logits(tiny_llama)
    distance = {base: float((logits(prepare(base=base)[1]) - plain).norm() / plain.norm()) for base in BASES}
    assert distance["none"] == 0 < distance["int8"] < distance["nf4"] < distance["fp4"] < 0.5


def test_double_quantization_reaches_the_layers(prepare: Prepare) -> None:
    def nested(double_quant: bool) -> set[bool]:
        _, model = prepare(base="nf4", double_quant=double_quant)
        return {layer.get_base_layer().weight.quant_state.nested for layer in adapters(model).values()}

    assert (nested(True), nested(False)) == ({True}, {False})


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("all-linear", PARTS),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("down_proj", ["down_proj"]),
        (["self_attn.o_proj"], ["o_proj"]),
    ],
)
def test_target_modules(wanted: str | list[str], parts: list[str], prepare: Prepare) -> None:
    _, model = prepare(base="none", target_modules=wanted)
    assert {name.rpartition(".")[2] for name in adapters(model)} == set(parts)
    assert len(adapters(model)) == 2 * len(parts)


def test_one_layer_by_its_full_name(tiny_llama: LlamaForCausalLM) -> None:
    name = "model.layers.1.mlp.up_proj"
    assert target_names(tiny_llama, name) == [name]
    assert target_names(tiny_llama, ["layers.1.mlp.up_proj", "up_proj"]) == ["model.layers.0.mlp.up_proj", name]


@pytest.mark.parametrize("wanted", ["query", ["q_proj", "proj"], "lm_head", ".*proj"])
def test_a_name_that_matches_nothing_lists_the_layers(wanted: str | list[str], tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError) as caught:
        target_names(tiny_llama, wanted)
    message = str(caught.value)
    assert repr(wanted if isinstance(wanted, str) else wanted[-1]) in message
    assert "there is: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_a_wrong_name_is_refused_before_anything_is_quantized(tiny_llama: LlamaForCausalLM) -> None:
    method = build_method(QLoraOptions(target_modules="query"))
    with pytest.raises(ModelError):
        method.prepare(tiny_llama, compute_dtype=torch.float32, device=CPU)
    assert type(tiny_llama.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 24 / 9), (True, 24 / 3)])
def test_the_scaling(rslora: bool, scaling: float, prepare: Prepare) -> None:
    _, model = prepare(base="none", r=9, lora_alpha=24, rslora=rslora)
    for layer in adapters(model).values():
        assert layer.scaling["default"] == pytest.approx(scaling)


@pytest.mark.parametrize("base", BASES)
def test_the_product_is_the_one_of_the_papers(base: str, prepare: Prepare) -> None:
    """y = x deq(W)^T + (lora_alpha / r) x A^T B^T"""
    _, model = prepare(base=base, lora_alpha=12, stir=True)
    layer = adapters(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        expected = x @ dense_weight(layer.get_base_layer()).t() + 12 / 4 * x @ a.t() @ b.t()
        torch.testing.assert_close(layer(x), expected, **_tolerance(base))


def _tolerance(base: str) -> dict[str, float]:
    # LLM.int8() rounds the layer's inputs too, of which a merged weight knows nothing.
    return {"rtol": 2e-2, "atol": 1e-2} if base == "int8" else {"rtol": 1e-4, "atol": 1e-4}


def test_dropout_acts_in_training_alone(prepare: Prepare) -> None:
    _, model = prepare(base="none", lora_dropout=0.5, stir=True)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_one_rate_for_all_without_loraplus(prepare: Prepare) -> None:
    method, model = prepare(base="none")
    (group,) = method.parameter_groups(model, 1e-3)
    assert group["lr"] == 1e-3
    assert len(group["params"]) == 2 * 14


@pytest.mark.parametrize("dora", [False, True])
def test_loraplus_gives_b_its_own_rate(dora: bool, prepare: Prepare) -> None:
    method, model = prepare(base="none", loraplus_ratio=16, dora=dora)
    rest, b = method.parameter_groups(model, 1e-3)
    assert (rest["lr"], b["lr"]) == (1e-3, 16e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("lora_B" in names[id(parameter)] for parameter in b["params"])
    assert not any("lora_B" in names[id(parameter)] for parameter in rest["params"])
    both = [id(parameter) for parameter in (*rest["params"], *b["params"])]
    assert len(both) == len(set(both))
    assert set(both) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_neftune_is_uniform_noise_of_the_papers_amplitude_in_training_alone(prepare: Prepare) -> None:
    alpha, length, width = 5.0, 32, 64
    _, model = prepare(base="none", neftune_alpha=alpha)
    embedding = model.get_base_model().get_input_embeddings()
    ids = torch.arange(length)[None].expand(8, -1)
    assert torch.equal(embedding(ids), embedding.weight[ids])
    model.train()
    noise = embedding(ids) - embedding.weight[ids]
    amplitude = alpha / math.sqrt(length * width)
    assert 0.98 * amplitude < float(noise.abs().max()) <= amplitude * (1 + 1e-5)
    assert float(noise.std()) == pytest.approx(amplitude / math.sqrt(3), rel=0.03)  # of a uniform distribution
    assert not torch.equal(noise, embedding(ids) - embedding.weight[ids])


@pytest.mark.parametrize("lora_init", ["default", "gaussian", "orthogonal"])
def test_initial_adapters(lora_init: str, prepare: Prepare) -> None:
    _, model = prepare(base="nf4", lora_init=lora_init, r=8, lora_alpha=8)
    layer = adapters(model)["model.layers.0.self_attn.q_proj"]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    if lora_init == "default":  # Kaiming-uniform of gain sqrt(1/3): within 1 / sqrt(in)
        assert float(a.abs().max()) <= 1 / 8 < 1.2 * float(a.abs().max())
    if lora_init == "gaussian":
        assert float(a.std()) == pytest.approx(1 / 8, rel=0.15)
    if lora_init == "orthogonal":
        assert float(b.std()) == pytest.approx(0.1 / math.sqrt(2), rel=0.15)
        assert float(a.std()) == pytest.approx(0.1 / math.sqrt(2), rel=0.15)
        assert float((b @ a).abs().max()) < 1e-6
    else:
        assert (b == 0).all() and (a != 0).all()


def state_of(method: QLora, model: nn.Module, **keys: Any) -> dict[str, torch.Tensor]:
    tensors = list(method.deployed(model, dtype=torch.float32, **keys).tensors())
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    values = {tensor.name: tensor.value() for tensor in tensors}
    assert all(tuple(values[tensor.name].shape) == tensor.shape for tensor in tensors)
    assert {t.name.split(".")[-2] for t in tensors if t.linear} == set(PARTS)
    return values


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_what_is_deployed_is_what_was_trained(base: str, dora: bool, prepare: Prepare, tiny_llama_dir: Path) -> None:
    method, model = prepare(base=base, dora=dora, lora_alpha=8, stir=True)
    plain = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama_dir)).eval()
    plain.load_state_dict(state_of(method, model), strict=True)
    live = logits(model.train())  # no dropout; in eval mode int8 rounds its inputs too, on a CPU
    torch.testing.assert_close(logits(plain), live, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - live).abs().max() > 0.05  # the adapters weigh something


@pytest.mark.parametrize("rslora", [False, True])
def test_deployed_into_the_original_base(rslora: bool, prepare: Prepare, tiny_llama: LlamaForCausalLM) -> None:
    method, model = prepare(base="nf4", rslora=rslora, lora_alpha=8, stir=True)
    original = tiny_llama.state_dict()
    merged = state_of(method, model, base=original)
    layer = adapters(model)["model.layers.1.mlp.down_proj"]
    scale = 8 / (2 if rslora else 4)
    change = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    key = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(merged[key], original[key] + change, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        merged[key] - state_of(method, model)[key], original[key] - dense_weight(layer.get_base_layer())
    )
    assert torch.equal(merged["lm_head.weight"], original["lm_head.weight"])


def test_a_tied_head_is_left_out_and_biases_are_kept() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    base = LlamaForCausalLM(config)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.bias.normal_()
    bias = base.model.layers[0].self_attn.q_proj.bias.detach().clone()
    method = build_method(QLoraOptions(r=2))
    assert isinstance(method, QLora)
    model = method.prepare(base, compute_dtype=torch.float32, device=CPU).train()
    state = state_of(method, model)
    assert "lm_head.weight" not in state
    assert torch.equal(state["model.layers.0.self_attn.q_proj.bias"], bias)
    plain = LlamaForCausalLM(config)
    assert plain.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    plain.tie_weights()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_saved_and_restored(base: str, dora: bool, prepare: Prepare, tmp_path: Path) -> None:
    method, model = prepare(base=base, dora=dora, stir=True)
    method.save(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"], config["use_dora"]) == (4, "LORA", dora)
    _, fresh = prepare(base=base, dora=dora)
    assert not torch.equal(logits(fresh), logits(model))
    method.restore(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "keys",
    [{"r": 8}, {"target_modules": ["q_proj"]}, {"dora": True}],
    ids=["rank", "fewer-layers", "dora"],
)
def test_an_adapter_of_other_settings_is_refused(keys: dict[str, Any], prepare: Prepare, tmp_path: Path) -> None:
    method, model = prepare(base="none", stir=True)
    method.save(model, tmp_path / "adapter")
    _, other = prepare(base="none", **keys)
    with pytest.raises(ModelError, match="does not fit") as caught:
        method.restore(other, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)


def test_an_adapter_that_lacks_layers_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    method, model = prepare(base="none", target_modules=["q_proj"], stir=True)
    method.save(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        method.restore(prepare(base="none")[1], tmp_path / "adapter")


def test_lines_tell_what_was_done(prepare: Prepare) -> None:
    method, model = prepare(base="nf4")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert method.lines(model) == [
        "base        nf4 + double quantization",
        "adapters    r 4, alpha 16, on 14 linear layers",
        f"trained     {trained:,} parameters",
    ]
    method, model = prepare(base="none")
    assert method.lines(model)[0] == "base        as stored"


def test_the_plain_model_is_the_one_inside(prepare: Prepare) -> None:
    method, model = prepare(base="nf4")
    inner = method.plain_model(model)
    assert isinstance(inner, LlamaForCausalLM)
    assert method.plain_model(inner) is inner
    assert torch.equal(logits(inner), logits(model))


@settings(max_examples=20, deadline=None)
@given(r=st.integers(1, 64), init=st.sampled_from(["default", "gaussian", "orthogonal"]))
def test_every_rank_but_odd_orthogonal_ones(r: int, init: str) -> None:
    wrong = init == "orthogonal" and r % 2 == 1
    try:
        QLoraOptions.model_validate({"r": r, "lora_init": init})
        assert not wrong
    except ValueError as error:
        assert wrong and f"method.r={r + 1}" in str(error)


def test_every_registered_method_has_its_implementation() -> None:
    for name in METHODS.names():
        cls = METHODS.get(name)
        assert cls.model_fields["name"].default == name
        assert type(build_method(cls(name=name))).__name__ == cls.implementation.rpartition(":")[2]
