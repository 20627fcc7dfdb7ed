"""Decoders of bytes with and without blocks: the same numbers, fewer kept, and everything around them as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules.convert import convert
from qtrain.modules.fused_int8 import GatedBytes, SharedBytes, fuse_int8
from qtrain.modules.kernel_choice import use_kernels
from qtrain.modules.quant_linear import QuantLinear

IDS = torch.arange(3, 43).view(2, 20)
W4A8 = {"weight": {"format": "int4"}, "activation": {"format": "int8"}, "kernels": "int8"}
Decoder = Callable[..., PreTrainedModel]


def prepared(model: PreTrainedModel, **keys: Any) -> PreTrainedModel:
    method = Qat(QatOptions.model_validate({"name": "qat", **W4A8, **keys}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    return model.train()


def bf16() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def step(model: PreTrainedModel, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> dict[str, Tensor]:
    """Logits, and the gradient of every weight."""
    model.zero_grad()
    with context():
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative one."""
    assert {name: one.dtype for name, one in found.items()} == {name: own.dtype for name, own in wanted.items()}
    return max(float((found[n] - own).norm() / own.norm().clamp(min=1e-30)) for n, own in wanted.items())


@pytest.mark.parametrize("gradient", ["full", "int8"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # q, k and v of qwen2 have biases
def test_blocks_give_what_their_layers_give(kind: str, gradient: str, decoder: Decoder) -> None:
    model = prepared(decoder(kind), input_gradient=gradient)
    wanted = step(model)
    words = fuse_int8(model, nullcontext)
    assert words == "2 QKV and 2 MLP as one function"
    found = step(model)
    assert torch.equal(found["logits"], wanted["logits"])  # the very products
    assert distance(found, wanted) <= 3e-6  # three gradients of one input are added up in another order


def test_learned_ranges_and_bf16(decoder: Decoder) -> None:
    model = prepared(decoder("llama"), weight={"format": "int4", "range": "learned"})
    wanted = step(model, bf16)
    assert any(name.endswith("weight_quantizer.scale") for name in wanted)
    assert fuse_int8(model, bf16).startswith("2 QKV and 2 MLP")
    assert distance(step(model, bf16), wanted) <= 0.02


def test_less_is_kept_for_the_backward(decoder: Decoder) -> None:
    def kept(model: PreTrainedModel) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=IDS).logits
        del logits
        return sum(found.values())

    model = prepared(decoder("llama"))
    before = kept(model)
    fuse_int8(model, nullcontext)
    # Of each layer and token: silu(g) in fp32, and down's codes.
    wide = model.config.intermediate_size
    assert before - kept(model) == 2 * IDS.numel() * (4 * wide + wide)


def test_without_gradients_watched_or_in_evaluation_layers_run_alone(decoder: Decoder) -> None:
    model = prepared(decoder("llama"))
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
    fuse_int8(model, nullcontext)
    calls: list[str] = []
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    handle = layer.register_forward_hook(lambda *_: calls.append("down"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, alone)
    assert calls == ["down"]
    step(model)
    assert calls == ["down", "down"]  # a watched layer is called in training too
    handle.remove()
    step(model)
    assert calls == ["down", "down"]


def test_other_kernels_and_unready_ranges_are_left_and_said(decoder: Decoder) -> None:
    model = prepared(decoder("llama"))
    wanted = step(model)
    fuse_int8(model, nullcontext)
    use_kernels(model, "plain")
    simulated = step(model)
    use_kernels(model, "int8")
    assert distance(simulated, wanted) > 0 and torch.equal(step(model)["logits"], wanted["logits"])
    other = prepared(decoder("llama"), rules={"*.k_proj": {"activation": None}})
    assert fuse_int8(other, nullcontext) == "2 MLP as one function; 6 layers alone: inputs are not quantized"
    grouped = prepared(decoder("llama"), rules={"*.down_proj": {"weight": {"group_size": 32}}})
    assert fuse_int8(grouped, nullcontext) == "2 QKV and 2 gate+up as one function"


def test_names_copies_and_conversion_are_as_before(decoder: Decoder) -> None:
    model = prepared(decoder("llama"))
    names = list(model.state_dict())
    wanted = step(model)
    fuse_int8(model, nullcontext)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(step(twin)["logits"], wanted["logits"])  # with its own weights
    convert(twin)
    assert not any(isinstance(module, QuantLinear) for module in twin.modules())
    assert distance({"logits": step(twin)["logits"]}, {"logits": wanted["logits"]}) < 0.05  # inputs are whole again


def test_a_block_that_computes_otherwise_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(decoder("llama"))
    wanted = step(model)
    for kind in (SharedBytes, GatedBytes):
        monkeypatch.setattr(kind, "outputs", scaled(kind.outputs))
    words = fuse_int8(model, nullcontext)
    assert words.startswith("no layers as one function; ") and "results that differ from a block's" in words
    assert torch.equal(step(model)["logits"], wanted["logits"])


def scaled(own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda block, x: tuple(1.1 * y for y in own(block, x))


@pytest.mark.parametrize("train", [True, False])
def test_inputs_by_their_name_are_for_the_layers_themselves(train: bool, decoder: Decoder) -> None:
    model = prepared(decoder("llama"))
    fuse_int8(model, nullcontext)
    block, x = model.get_submodule("model.layers.0"), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    q, mlp = block.get_submodule("self_attn.q_proj"), block.get_submodule("mlp")
    with torch.set_grad_enabled(train):
        assert torch.equal(q(input=x), q(x)) and torch.equal(mlp(x=x), mlp(x))
        with pytest.raises(TypeError):
            q(x, x)
