"""Where scales can move in the blocks of many families, and that moving them changes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qtrain.ptq.block_text import BlockText, DecoderText
from qtrain.ptq.folds import Fold, find_folds

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHARED_HEADS = {"num_key_value_heads": 2}
GATED = [
    ("input_layernorm", "q_proj k_proj v_proj"),
    ("v_proj", "o_proj"),
    ("post_attention_layernorm", "gate_proj up_proj"),
    ("up_proj", "down_proj"),
]
GEMMA2 = [*GATED[:2], ("pre_feedforward_layernorm", "gate_proj up_proj"), GATED[3]]
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, SHARED_HEADS, GATED),
    "mistral": (MistralConfig, MistralForCausalLM, SHARED_HEADS, GATED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, SHARED_HEADS, GATED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SHARED_HEADS | {"head_dim": 16}, GATED),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 16}, GATED),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, SHARED_HEADS | {"head_dim": 16}, GEMMA2),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, SHARED_HEADS | {"head_dim": 16}, GEMMA2),
    # Norms without weights.
    "olmo": (OlmoConfig, OlmoForCausalLM, SHARED_HEADS, [GATED[1], GATED[3]]),
    # Norms after the sublayers: nothing feeds q, k, v and gate, up but the residual stream.
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, SHARED_HEADS, [GATED[1], GATED[3]]),
    # The router and the experts' fused weights take the same norm's output.
    "mixtral": (MixtralConfig, MixtralForCausalLM, SHARED_HEADS | {"num_local_experts": 4}, GATED[:2]),
    # q, k and v in one layer; GELU between the others.
    "gpt_neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {},
        [("input_layernorm", "query_key_value"), ("post_attention_layernorm", "dense_h_to_4h")],
    ),
    "phi": (PhiConfig, PhiForCausalLM, {}, [("input_layernorm", "q_proj k_proj v_proj fc1"), ("v_proj", "dense")]),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        [
            ("self_attn_layer_norm", "q_proj k_proj v_proj"),
            ("v_proj", "out_proj"),
            ("final_layer_norm", "fc1"),
            ("fc1", "fc2"),
        ],
    ),
}


def family(name: str) -> PreTrainedModel:
    """A tiny random model whose norms and biases are no ones and zeros."""
    config, model_class, own, _ = FAMILIES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config(**(SIZES | own))).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))


def block(model: PreTrainedModel, k: int = 1) -> BlockText:
    with torch.no_grad():
        text = DecoderText.of(model, [ids(2, 20)], nullcontext, lambda items, total: items)
        for i in range(k):
            text.leave(text.at(i, []))
    name = f"{text.prefix}.{k}"
    layers = [f"{name}.{n}" for n, module in text.blocks[k].named_modules() if isinstance(module, nn.Linear)]
    return text.at(k, layers)


def folds_of(model: PreTrainedModel) -> list[Fold]:
    with torch.no_grad():
        return find_folds(block(model))


def short(fold: Fold) -> tuple[str, str]:
    last = [name.rpartition(".")[2] for name in (fold.source, *fold.consumers)]
    return last[0], " ".join(last[1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_folds_where_its_architecture_allows(name: str) -> None:
    assert [short(fold) for fold in folds_of(family(name))] == FAMILIES[name][3]


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_leaves_the_function_unchanged(name: str) -> None:
    model = family(name).double()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    folds = folds_of(model)
    with torch.no_grad():
        before = model(ids(2, 30)).logits
        for fold in folds:
            rows = len(model.get_parameter(f"{fold.source}.weight"))
            kept = model.get_parameter(f"{fold.source}.weight").clone()
            fold.apply(model, torch.exp(torch.randn(rows, dtype=torch.float64)))
            assert not torch.allclose(kept, model.get_parameter(f"{fold.source}.weight"), rtol=0.1)
        after = model(ids(2, 30)).logits
    # Gemma's norms compute with their weight in fp32 whatever its dtype is.
    atol = 1e-5 if name.startswith("gemma") else 1e-12
    torch.testing.assert_close(after, before, rtol=0, atol=atol)


def test_query_heads_share_the_channels_of_their_kv_head() -> None:
    (fold,) = (fold for fold in folds_of(family("llama")) if fold.source.endswith("v_proj"))
    heads = fold.channel.reshape(4, 8)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3])
    assert torch.equal(heads[::2].flatten(), torch.arange(16))


def test_no_block_is_changed_by_the_search() -> None:
    model = family("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert folds_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_16_bit_models_have_the_same_folds() -> None:
    assert [short(fold) for fold in folds_of(nn.Module.to(family("gemma2"), torch.bfloat16))] == GEMMA2


def test_only_groups_with_a_layer_to_quantize_are_folded_and_their_other_consumers_come_along() -> None:
    model = family("llama")
    whole = block(model)
    own = BlockText(**{**vars(whole), "layers": [f"{whole.name}.self_attn.q_proj"]})
    with torch.no_grad():
        assert [short(fold) for fold in find_folds(own)] == GATED[:1]


class NormedResidual(LlamaDecoderLayer):
    """The first norm's output goes into the residual stream too."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        normed: torch.Tensor = self.input_layernorm(hidden_states)
        return super().forward(hidden_states, *args, **kwargs) + 1e-3 * normed


def test_a_norm_that_feeds_something_else_is_left_alone() -> None:
    model = family("llama")
    model.model.layers[1].__class__ = NormedResidual
    assert [short(fold) for fold in folds_of(model)] == GATED[1:]


class Routed(nn.Module):
    """Experts that are modules of their own, of which each token takes one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.up = nn.ModuleList([nn.Linear(width, inner) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(inner, width) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            if (chosen == number).any():
                out[chosen == number] = down(up(x[chosen == number]).relu())
        return out


def test_experts_fold_within_themselves() -> None:
    model = family("llama")
    model.set_submodule("model.layers.1.mlp", Routed(32, 48))
    found = [fold for fold in folds_of(model) if "mlp" in fold.consumers[0]]
    assert found
    assert all(fold.source == fold.consumers[0].replace("down", "up") for fold in found)


def test_tied_weights_are_not_touched() -> None:
    model = family("llama")
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    assert [short(fold) for fold in folds_of(model)] == GATED[1:3]


def test_features_that_no_token_wakes_do_not_hide_the_others() -> None:
    model = family("opt")
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data[5] = -1e3  # its ReLU never fires
    assert short(folds_of(model)[-1]) == ("fc1", "fc2")


def test_flash_attention_is_replaced_for_the_experiment() -> None:
    model = family("llama")
    own = block(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    with torch.no_grad():
        assert [short(fold) for fold in find_folds(own)] == GATED
    assert model.config._attn_implementation == "flash_attention_2"
