from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qtrain.errors import ConfigError, ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.convert import convert
from qtrain.modules.prepare import prepare_modules
from qtrain.modules.quant_activation import PactActivation
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import full_precision, quantizers, round_to_nearest

INT4 = QuantizerSection(format="int4")
INT8 = QuantizerSection(format="int8")
LEARNED = QuantizerSection(format="int4", range="learned", calibrate="mse")
PACT = QuantizerSection(format="int4", symmetric=False, range="pact")


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        return self.fc(self.relu(self.block(x)).mean((2, 3)))


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            tie_word_embeddings=tied,
        )
    )


def formats(model: nn.Module) -> dict[str, str]:
    return {name: quantizer.spec.format for name, quantizer in quantizers(model)}


def test_every_kind_of_layer_is_swapped_and_computes_on_its_levels() -> None:
    torch.manual_seed(0)
    model = ConvNet().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare_modules(model, weight=INT8, activation=INT8, pact=PACT)
    assert prepared.names == {
        "linear": ["fc"],
        "conv2d": ["stem", "block.0", "block.2"],
        "embedding": [],
        "pact": ["relu", "block.1"],
    }
    assert len(prepared) == 6 and prepared.notes == [] and prepared.skipped == {}
    assert isinstance(model.stem, QuantConv2d) and isinstance(model.fc, QuantLinear)
    assert isinstance(model.relu, PactActivation)
    assert not torch.equal(model(x), plain(x))
    with full_precision(model):
        assert torch.equal(model(x), plain(x))
    assert all(quantizer.enabled for _, quantizer in quantizers(model))


def test_parameters_keep_their_names_and_identity() -> None:
    model = ConvNet()
    before = dict(model.named_parameters())
    prepare_modules(model, weight=INT4)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_a_layer_stays_the_object_it_was_so_hooks_and_aliases_hold() -> None:
    model = ConvNet()
    model.alias = model.fc
    held = [model.fc, model.stem]
    seen: list[str] = []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    prepare_modules(model, weight=INT4)
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["QuantLinear"]
    assert model.alias is model.fc is held[0] and isinstance(held[1], QuantConv2d)


def test_a_shared_relu_gets_a_bound_for_each_name() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), nn.ReLU6())
    assert prepare_modules(model, weight=INT4, pact=PACT).names["pact"] == ["1", "3", "5"]
    assert len({id(model[at]) for at in (1, 3, 5)}) == 3


def test_a_second_call_changes_nothing() -> None:
    model = llama(tied=True)
    keys: dict[str, Any] = {"weight": LEARNED, "activation": INT8, "embedding": INT8, "first_last": "int8"}
    first = prepare_modules(model, **keys)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_modules())
    second = prepare_modules(model, **keys)
    assert second.names == first.names
    assert all(objects[name] is module for name, module in model.named_modules())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert first.notes and second.notes == []


def test_rules_change_and_switch_off_later_ones_win() -> None:
    model = llama()
    prepare_modules(
        model,
        weight=INT4,
        activation=INT8,
        rules={
            "*.mlp.*": {"weight": {"format": "int8"}},
            "*.down_proj": {"activation": None, "weight": {"granularity": "per_group", "group_size": 16}},
            "*.layers.1.mlp.up_proj": {"weight": None, "activation": None},
        },
    )
    layers = model.model.layers
    assert layers[0].self_attn.q_proj.weight_quantizer.spec.format == "int4"
    assert layers[0].mlp.up_proj.weight_quantizer.spec.format == "int8"
    down = layers[0].mlp.down_proj
    assert (down.weight_quantizer.spec.format, down.weight_quantizer.spec.group_size) == ("int8", 16)
    assert down.input_quantizer is None
    assert type(layers[1].mlp.up_proj) is nn.Linear


def test_only_what_a_rule_names_where_nothing_is_general() -> None:
    model = llama()
    prepared = prepare_modules(model, rules={"*.down_proj": {"weight": {"format": "int4"}}})
    assert prepared.names["linear"] == [f"model.layers.{at}.mlp.down_proj" for at in (0, 1)]


def test_first_and_last_layer_in_eight_bits() -> None:
    model = ConvNet()
    prepare_modules(model, weight=INT4, activation=INT4, first_last="int8")
    found = formats(model)
    assert found["stem.weight_quantizer"] == found["stem.input_quantizer"] == "int8"
    assert found["fc.weight_quantizer"] == found["fc.input_quantizer"] == "int8"
    assert found["block.0.weight_quantizer"] == found["block.2.input_quantizer"] == "int4"


def test_the_weights_of_an_end_in_eight_bits_learn_no_scale() -> None:
    model = ConvNet()
    prepare_modules(model, weight=LEARNED, first_last="int8")
    ends = [layer.weight_quantizer.section for layer in (model.stem, model.fc)]
    assert [(one.format, one.range) for one in ends] == [("int8", "dynamic")] * 2
    assert model.block[0].weight_quantizer.section.range == "learned"
    fewer = ConvNet()
    prepare_modules(fewer, weight=LEARNED, first_last="int6")
    assert fewer.stem.weight_quantizer.section.range == "learned"


def test_with_pact_the_inputs_of_the_ends_are_quantized_too() -> None:
    model = ConvNet()
    prepare_modules(model, weight=INT4, pact=PACT, first_last="int8")
    assert formats(model)["stem.input_quantizer"] == "int8"
    assert model.block[0].input_quantizer is None


def test_a_rule_wins_over_first_last_and_a_skipped_end_stays() -> None:
    model = ConvNet()
    prepare_modules(model, weight=INT4, first_last="int8", rules={"stem": {"weight": {"format": "int6"}}}, skip=["fc"])
    found = formats(model)
    assert found["stem.weight_quantizer"] == "int6"
    assert found["block.2.weight_quantizer"] == "int4"
    assert type(model.fc) is nn.Linear


def test_the_head_is_skipped_unless_it_is_asked_for() -> None:
    model = llama()
    prepared = prepare_modules(model, weight=INT4)
    assert "head=True" in prepared.skipped["lm_head"]
    assert prepared.skipped["model.embed_tokens"] == "no embedding options"
    assert "lm_head" in prepare_modules(llama(), weight=INT4, head=True).names["linear"]


def test_a_head_inside_another_module_is_found() -> None:
    model = nn.ModuleDict({"net": llama()})
    assert "net.lm_head" in prepare_modules(model, weight=INT4).skipped


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"skip": ["lm_head", "*.gate"]}, r"skip pattern '\*\.gate' matches no layer"),
        ({"skip": ["q_proj"]}, r"'\*\.q_proj' \(which is model\.layers\.0\.self_attn\.q_proj\)"),
        ({"rules": {"*.down": {"weight": None}}}, r"rule '\*\.down' matches no layer"),
        ({"rules": {"lm_head": {"weight": {"format": "int8"}}}}, "head=True"),
        ({"rules": {"model.embed_tokens": {"weight": {"format": "int8"}}}}, "weight of no layer"),
        ({"skip": ["*"]}, "no layer to quantize"),
    ],
)
def test_patterns_that_do_nothing_are_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prepare_modules(llama(), weight=INT4, **keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": {}}, "did you mean 'weight'"),
        ({"weight": {"fromat": "int8"}}, r"rules\['\*proj'\]\.weight: 'fromat' is no key; did you mean 'format'"),
        ({"weight": {"format": "int9"}}, "no such format"),
        ({"weight": "int8"}, r"try:  \{'format': 'int8'\}"),
    ],
)
def test_mistakes_in_a_rule_are_told_with_their_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_modules(llama(), weight=INT4, rules={"*proj": change})


def test_nothing_asked_for_is_an_error() -> None:
    with pytest.raises(ModelError, match="no layer to quantize"):
        prepare_modules(llama())


def test_tied_weights_are_quantized_once() -> None:
    model = llama(tied=True)
    prepared = prepare_modules(model, weight=LEARNED, embedding=LEARNED, head=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
    assert embedding.weight is head.weight and embedding.weight_quantizer is head.weight_quantizer
    assert torch.equal(embedding.codes()[0], head.codes()[0])
    assert prepared.notes == [] and model.config.tie_word_embeddings


@pytest.mark.parametrize("side", ["head", "embedding"])
def test_a_weight_tied_to_a_quantized_one_keeps_full_precision(side: str) -> None:
    model = llama(tied=True)
    original = model.model.embed_tokens.weight
    keys: dict[str, Any] = {"head": True} if side == "head" else {"embedding": INT4}
    prepared = prepare_modules(model, weight=INT4, **keys)
    assert model.model.embed_tokens.weight is original and model.lm_head.weight is not original
    assert torch.equal(model.lm_head.weight, original)
    assert "untied" in prepared.notes[0] and "3,072 parameters more" in prepared.notes[0]
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is not original
    assert "lm_head.weight" in dict(model.named_parameters())


def test_tied_weights_with_different_options_are_refused() -> None:
    with pytest.raises(ModelError, match="share one weight"):
        prepare_modules(llama(tied=True), weight=INT4, embedding=INT8, head=True)


def test_three_tied_tables_of_an_encoder_decoder_share_one_quantizer() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64, tie_word_embeddings=True)
    model = T5ForConditionalGeneration(config)
    prepared = prepare_modules(model, weight=INT4, embedding=INT8, skip=["*relative_attention_bias"])
    tables = {id(module.weight_quantizer) for module in model.modules() if isinstance(module, QuantEmbedding)}
    assert len(tables) == 1
    assert "lm_head" in prepared.skipped and any("untied" in note for note in prepared.notes)


def test_embeddings_that_scale_their_rows_are_quantized_as_themselves() -> None:
    """Gemma's multiplies what it looks up by sqrt(d): its class goes on with quantized rows."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=8, vocab_size=64
    )
    model = Gemma3ForCausalLM(config).eval()
    table = model.model.embed_tokens
    kind, ids = type(table), torch.arange(10)
    plain = table(ids)
    prepared = prepare_modules(model, weight=INT4, embedding=INT4, head=True)
    assert prepared.names["embedding"] == ["model.embed_tokens"] and prepared.notes == []
    assert isinstance(table, QuantEmbedding) and isinstance(table, kind)
    assert model.lm_head.weight_quantizer is table.weight_quantizer
    rows = table(ids)
    assert torch.equal(rows, table.quantized_weight()[ids] * table.embed_scale) and not torch.equal(rows, plain)
    with full_precision(model):
        assert torch.equal(table(ids), plain)
    prepare_modules(copy.deepcopy(model), weight=INT4, embedding=INT4, head=True)
    convert(model)
    assert type(table) is kind and torch.equal(table(ids), rows)


def test_embeddings_that_look_up_in_ways_of_their_own_are_left_alone() -> None:
    class Hashed(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input % 3]

    model = nn.Sequential(Hashed(8, 4), nn.Linear(4, 4))
    prepared = prepare_modules(model, weight=INT4, embedding=INT4)
    assert prepared.skipped == {"0": "a Hashed is left alone"}
    assert "embedding quantized nothing" in prepared.notes[0]


def test_an_encoder_is_prepared_and_its_tied_head_left() -> None:
    model = BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    )
    prepared = prepare_modules(model, weight=INT4, activation=INT4)
    assert "cls.predictions.decoder" in prepared.skipped
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_subclasses_and_other_modules_are_left_alone_and_named() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4), nn.LSTM(4, 4), nn.Conv1d(4, 4, 1))
    prepared = prepare_modules(model, weight=INT4)
    assert prepared.names["linear"] == ["0"]
    assert prepared.skipped == {
        f"{at}": f"a {kind} is left alone" for at, kind in ((1, "Odd"), (2, "LSTM"), (3, "Conv1d"))
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_adapters_of_peft_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    prepared = prepare_modules(model, weight=INT4)
    inside = [name for name, reason in prepared.skipped.items() if reason == "inside an adapter's layer"]
    assert len(inside) == 6 and all("q_proj" in name for name in inside)


def test_pact_that_replaced_nothing_is_told() -> None:
    prepared = prepare_modules(nn.Sequential(nn.Linear(4, 4), nn.GELU()), weight=INT4, pact=PACT)
    assert "pact replaced nothing" in prepared.notes[0]


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_transformer_evaluates_on_the_levels_it_trains_on(padded: bool) -> None:
    """Its fused evaluation path takes linear1.weight as it is; without the switch evaluation would be unquantized."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    prepared = prepare_modules(model, weight=INT4)
    assert prepared.names["linear"] == [f"layers.{at}.linear{which}" for at in (0, 1) for which in (1, 2)]
    assert "self_attn" in "".join(prepared.skipped)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    trained = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=mask)
    assert torch.allclose(trained[0], evaluated[0], atol=1e-6)


def test_a_pruned_layer_keeps_its_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prepare_modules(model, weight=LEARNED)
    model(torch.randn(2, 8)).sum().backward()
    weights = model[0].quantized_weight()
    assert int((weights == 0).sum()) >= 32
    assert model[0].weight_orig.grad is not None
    assert model[0].weight_quantizer.scale.grad is not None


def test_round_to_nearest_is_what_a_fresh_dynamic_model_computes() -> None:
    torch.manual_seed(0)
    model = ConvNet().eval()
    dynamic = copy.deepcopy(model)
    static = QuantizerSection(format="int8", range="static", granularity="per_tensor", bounds=(-1.0, 1.0))
    prepare_modules(model, weight=LEARNED, activation=static)
    prepare_modules(dynamic, weight=INT4, activation=QuantizerSection(granularity="per_tensor"))
    with torch.no_grad():
        for _, quantizer in quantizers(model):
            if quantizer.learns:
                quantizer.scale.mul_(3)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8, 8)
    trained = model(x)
    with round_to_nearest(model):
        assert torch.equal(model(x), dynamic(x))
    assert torch.equal(model(x), trained)


def test_round_to_nearest_with_pact_begins_at_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    prepare_modules(model, weight=INT4, pact=PACT)
    x = torch.randn(64, 4)
    with round_to_nearest(model):
        y = model(x)
        levels = y.unique()
    assert 0.0 in levels and y.min() == 0 and len(levels) <= 16
    assert not model[1]._forward_pre_hooks


def test_round_to_nearest_of_ranges_that_were_never_calibrated() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_modules(model, weight=INT4, activation=QuantizerSection(range="static"))
    with pytest.raises(ModelError, match=r"qtrain\.modules\.calibrate\.calibrate"):
        model(torch.randn(2, 4))
    with round_to_nearest(model):
        model(torch.randn(2, 4))
    with pytest.raises(ModelError, match="no range yet"):
        model(torch.randn(2, 4))


@given(
    format=st.sampled_from(["int2", "int4", "int8", "ternary", "binary", "fp8_e4m3"]),
    tied=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_converted_models_are_plain_and_compute_the_same(format: str, tied: bool) -> None:
    model = llama(tied)
    section = QuantizerSection(format=format)
    prepare_modules(model, weight=section, embedding=section, head=True)
    ids = torch.arange(10)[None]
    trained = model(ids).logits
    assert convert(model) == []
    assert not list(quantizers(model))
    assert {type(module) for module in model.modules()} == {type(module) for module in llama().modules()}
    assert model.state_dict().keys() == llama().state_dict().keys()
    assert torch.equal(model(ids).logits, trained)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_convert_merges_adapters_keeps_pacts_clip_and_names_what_it_drops() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    prepare_modules(model, weight=INT8, pact=PACT, rules={"2": {"activation": {"format": "int8"}}})
    layer = model[2]
    assert isinstance(layer, QuantLinear)
    layer.add_adapter(2, 4.0)
    with torch.no_grad():
        assert layer.lora_B is not None
        layer.lora_B.normal_()
    merged = layer.quantized_weight().detach().clone()
    assert convert(model) == ["1.quantizer", "2.input_quantizer"]
    assert torch.equal(model[2].weight, merged)
    assert [name for name, _ in model[2].named_parameters()] == ["weight", "bias"]
    assert isinstance(model[1], nn.Hardtanh) and (model[1].min_val, model[1].max_val) == (0.0, 10.0)
