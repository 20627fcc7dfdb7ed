"""PEQA's decoders with and without their MLPs as blocks: the same gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtrain.methods.peqa.config import PeqaOptions
from qtrain.methods.peqa.method import Peqa
from qtrain.modules.fused_packed import fuse_packed

IDS = torch.arange(3, 43).view(2, 20)
Decoder = Callable[..., PreTrainedModel]
GROUPS = {"group_size": 16, "symmetric": False}


def prepared(model: PreTrainedModel, weight: dict[str, Any], **keys: Any) -> PreTrainedModel:
    options = {"name": "peqa", "init": "rtn", "weight": {"format": "int4", **weight}, **keys}
    method = Peqa(PeqaOptions.model_validate(options))
    model.requires_grad_(False)
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    return model.train()


def bf16() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def step(model: PreTrainedModel, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> dict[str, Tensor]:
    """Logits, and the gradient of everything that trains."""
    model.zero_grad()
    with context():
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative one."""
    assert {name: one.dtype for name, one in found.items()} == {name: own.dtype for name, own in wanted.items()}
    return max(float((found[n] - own).norm() / own.norm().clamp(min=1e-30)) for n, own in wanted.items())


@pytest.mark.parametrize("weight", [{}, GROUPS], ids=["rows", "groups"])
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_give_what_their_layers_give(weight: dict[str, Any], zero_points: bool, decoder: Decoder) -> None:
    keys = weight | ({"symmetric": False} if zero_points else {})
    model = prepared(decoder("llama"), keys, zero_points=zero_points)
    wanted = step(model)
    assert any(name.endswith("down_proj.zero") for name in wanted) == zero_points
    assert fuse_packed(model, nullcontext) == "2 MLPs that keep no input of their last layer"
    assert distance(step(model), wanted) <= 3e-6


def test_under_autocast_within_the_rounding_of_bf16(decoder: Decoder) -> None:
    model = prepared(decoder("llama"), GROUPS)
    wanted = step(model, bf16)
    with bf16():
        assert fuse_packed(model, bf16).startswith("2 MLPs")
    assert distance(step(model, bf16), wanted) <= 0.03


def test_h_is_not_kept(decoder: Decoder) -> None:
    def kept(model: PreTrainedModel) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=IDS).logits
        del logits
        return sum(found.values())

    model = prepared(decoder("llama"), GROUPS)
    before = kept(model)
    fuse_packed(model, nullcontext)
    # Of each layer and token: silu(g) and h, in fp32.
    assert before - kept(model) == 2 * IDS.numel() * 2 * 4 * model.config.intermediate_size


def test_in_evaluation_and_watched_layers_run_as_they_are(decoder: Decoder) -> None:
    model = prepared(decoder("llama"), GROUPS)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
    fuse_packed(model, nullcontext)
    calls: list[str] = []
    handle = model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(lambda *_: calls.append("down"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, alone)
    step(model)
    assert calls == ["down", "down"]
    handle.remove()
    step(model)
    assert calls == ["down", "down"]


def test_another_mlp_is_left(decoder: Decoder) -> None:
    model = prepared(decoder("gpt_neox"), GROUPS)
    assert fuse_packed(model, nullcontext) == "0 MLPs that keep no input of their last layer"
