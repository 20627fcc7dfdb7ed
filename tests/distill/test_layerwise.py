"""Layer-by-layer distillation on tiny decoders whose weights a stand-in fake quantization perturbs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from qtrain.distill.layerwise import distill_layerwise
from qtrain.errors import DataError, ModelError
from qtrain.modules.blocks import decoder_blocks, states, watch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5)).eval()
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=5)).eval()
    # Sliding and full attention in turn: each block has a mask and rotary angles of its own.
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ).eval()


class StraightThrough(nn.Module):
    """Weights on a grid of 8 levels a row; the gradient passes."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(-1, keepdim=True) / 3
        return weight + ((weight / scale).round().clamp(-4, 3) * scale - weight).detach()


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    student = copy.deepcopy(model)
    for module in list(student.get_decoder().modules()):
        if isinstance(module, nn.Linear):
            register_parametrization(module, "weight", StraightThrough())
    return student


def rows(count: int = 10, length: int = 12) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(1))


def hidden_after(model: PreTrainedModel, block: int, ids: Tensor) -> Tensor:
    """Output of a block in an ordinary forward of the model."""
    seen: list[Tensor] = []
    module = decoder_blocks(model)[1][block]
    handle = module.register_forward_hook(lambda _, __, output: seen.append(states(output)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_the_blocks_are_found_without_their_path() -> None:
    for kind, name in {"llama": "layers", "neox": "layers", "gemma3": "layers", "mixtral": "layers"}.items():
        found, content = decoder_blocks(tiny(kind))
        assert (found, len(content)) == (name, 3)


def test_lists_inside_of_blocks_do_not_count() -> None:
    model = tiny("llama")
    for block in decoder_blocks(model)[1]:
        block.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    assert len(decoder_blocks(model)[1]) == 3


@pytest.mark.parametrize("kind", ["llama", "neox", "gemma3"])
def test_a_block_called_again_gives_what_the_model_gave(kind: str) -> None:
    model, ids = tiny(kind), rows(3)
    blocks = decoder_blocks(model)[1]
    hidden, calls = watch(model, blocks, ids)
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        with torch.no_grad():
            hidden = call(block, hidden)
        assert torch.equal(hidden, hidden_after(model, number, ids))


@pytest.mark.parametrize("prefix", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["llama", "neox", "gemma3"])
def test_every_blocks_error_falls(kind: str, prefix: Any) -> None:
    teacher = tiny(kind)
    student = prepared(teacher)
    found = distill_layerwise(teacher, student, rows(), steps=30, lr=2e-3, batch_size=4, prefix=prefix)
    assert [block.name for block in found] == ["layers.0", "layers.1", "layers.2"]
    assert all(0 < block.after < 0.8 * block.before for block in found), found


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_the_errors_are_those_of_the_models(prefix: Any) -> None:
    teacher, ids = tiny("neox"), rows()
    student = prepared(teacher)
    untrained = copy.deepcopy(student)
    found = distill_layerwise(teacher, student, ids, steps=20, lr=2e-3, batch_size=4, prefix=prefix)
    # The first block has the same inputs in both; the last of the student's chain is the model's own output.
    for model, expected in ((untrained, found[0].before), (student, found[0].after)):
        error = F.mse_loss(hidden_after(model, 0, ids), hidden_after(teacher, 0, ids))
        assert float(error) == pytest.approx(expected, rel=1e-5)
    chain = float(F.mse_loss(hidden_after(student, 2, ids), hidden_after(teacher, 2, ids)))
    if prefix == "student":
        assert found[2].after == pytest.approx(chain, rel=1e-5)
    assert chain < float(F.mse_loss(hidden_after(untrained, 2, ids), hidden_after(teacher, 2, ids)))


def test_nothing_else_changes() -> None:
    teacher = tiny("neox")
    student = prepared(teacher)
    student.train()
    decoder_blocks(student)[1][1].eval()
    frozen = decoder_blocks(student)[1][0].mlp.dense_h_to_4h.parametrizations.weight.original
    frozen.requires_grad_(False)
    teacher_before = copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    modes = [module.training for module in student.modules()]
    distill_layerwise(teacher, student, rows(), steps=3, lr=1e-3, batch_size=4)
    assert [module.training for module in student.modules()] == modes
    assert not frozen.requires_grad and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, teacher_before[name]) for name, value in teacher.state_dict().items())
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".layers." in name for name in changed)
    assert not any("layers.0.mlp.dense_h_to_4h.parametrizations" in name for name in changed)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_a_training_that_does_harm_is_undone() -> None:
    teacher = tiny("llama")
    student = prepared(teacher)
    before = copy.deepcopy(student.state_dict())
    found = distill_layerwise(teacher, student, rows(), steps=2, lr=10.0, batch_size=4)
    assert all(block.after == block.before for block in found)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_it_is_repeatable_and_the_seed_matters() -> None:
    def trained(seed: int) -> list[float]:
        teacher = tiny("llama")
        found = distill_layerwise(
            teacher, prepared(teacher), rows(), steps=3, lr=1e-3, batch_size=3, storage=torch.bfloat16, seed=seed
        )
        return [block.after for block in found]

    assert trained(0) == trained(0) != trained(1)


def test_groups_choose_what_trains_and_how_fast() -> None:
    teacher = tiny("llama")
    student = prepared(teacher)
    before = copy.deepcopy(student.state_dict())

    def norms(block: nn.Module, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for name, p in block.named_parameters() if "norm" in name], "lr": 10 * lr}]

    distill_layerwise(teacher, student, rows(), steps=10, lr=1e-4, batch_size=4, groups=norms)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("norm" in name for name in changed)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(("context", "around"), [(autocast, nullcontext), (nullcontext, autocast)])
def test_autocast_sees_each_steps_weights(context: Any, around: Any) -> None:
    # Autocast keeps the bf16 copy of a leaf that it made first, here of the biases, until it is told otherwise.
    def biases(block: nn.Module, lr: float) -> list[dict[str, Any]]:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        return [{"params": [linear.bias for linear in linears], "lr": lr}]

    teacher = tiny("neox")
    student = prepared(teacher)
    with around():
        found = distill_layerwise(
            teacher, student, rows(), steps=30, lr=1e-2, batch_size=4, groups=biases, context=context
        )
    assert all(block.after < 0.97 * block.before for block in found), found


@pytest.mark.parametrize(("storage", "width"), [(None, 4), (torch.bfloat16, 2)])
def test_what_is_held_is_one_block_of_all_rows(storage: torch.dtype | None, width: int, largest: Any) -> None:
    teacher, ids = tiny("llama"), rows(100, 16)
    with largest() as seen:
        distill_layerwise(teacher, prepared(teacher), ids, steps=1, lr=1e-3, batch_size=2, storage=storage)
    assert seen.bytes == 100 * 16 * 32 * width


def test_progress_counts_blocks() -> None:
    seen: list[int] = []

    def progress(items: Iterator[int], total: int) -> Iterator[int]:
        seen.append(total)
        for item in items:
            seen.append(item)
            yield item

    teacher = tiny("llama")
    distill_layerwise(teacher, prepared(teacher), rows(2), steps=1, lr=1e-3, progress=progress)
    assert seen == [3, 0, 1, 2]


def test_what_cannot_be_trained_so_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny("llama")
    student = prepared(teacher)
    with pytest.raises(DataError, match=r"rows of shape \[0, 12\]"):
        distill_layerwise(teacher, student, rows(0), steps=1, lr=1e-3)
    decoder_blocks(student)[1].requires_grad_(False)
    with pytest.raises(ModelError, match=r"layers: no parameter of the decoder's blocks"):
        distill_layerwise(teacher, student, rows(), steps=1, lr=1e-3)
    decoder = teacher.get_decoder()
    layers, decoder.layers = decoder.layers, nn.Identity()
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        decoder_blocks(teacher)
    decoder.layers = nn.ModuleList(reversed(layers))
    with pytest.raises(ModelError, match="does not call its blocks one after the other"):
        watch(teacher, layers, rows(1))


def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    teacher = tiny("llama")
    student = prepared(teacher)

    def tells_tokens(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        decoder_tokens.append(kwargs["input_ids"])

    decoder_tokens: list[Tensor] = []
    teacher.get_decoder().register_forward_pre_hook(tells_tokens, with_kwargs=True)

    def adds_tokens(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "per_token": decoder_tokens[-1]}

    for block in decoder_blocks(teacher)[1]:
        block.register_forward_pre_hook(adds_tokens, with_kwargs=True)
    with pytest.raises(ModelError, match="arguments that depend on the tokens"):
        distill_layerwise(teacher, student, rows(), steps=1, lr=1e-3, batch_size=4)
