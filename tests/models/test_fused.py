"""Fused layers: what is said where there are none, and what of liger-kernel's log is kept off the screen."""

from __future__ import annotations

import inspect
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qtrain.kernels.rotary import Rotary
from qtrain.models.fused import fuse_layers, liger_turn

REGISTRY = "liger_kernel.backends.registry"


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A liger-kernel that changes names of Llama's file as the real one does; the keys of its calls."""
    calls: list[dict[str, Any]] = []
    package, transformers, patch, rope = (
        ModuleType(f"liger_kernel{name}") for name in ("", ".transformers", ".transformers.monkey_patch", ".rope")
    )

    def rotary(q: object, k: object, cos: object, sin: object) -> str:
        return "kernel"

    def apply(model: object, **keys: Any) -> None:
        calls.append(keys)
        setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # noqa: B010
        setattr(modeling_llama, "LlamaRMSNorm", type("LigerRMSNorm", (), {}))  # noqa: B010

    vars(transformers)["_apply_liger_kernel_to_instance"] = apply
    vars(patch)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": apply}
    vars(rope)["liger_rotary_pos_emb"] = rotary
    for name, module in (
        ("liger_kernel", package),
        ("liger_kernel.transformers", transformers),
        ("liger_kernel.transformers.monkey_patch", patch),
        ("liger_kernel.transformers.rope", rope),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))  # back after the test
    return calls


def test_the_modelling_file_stays_as_it_was(tiny_llama: LlamaForCausalLM, liger: list[dict[str, Any]]) -> None:
    norm, own = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        words = fuse_layers(tiny_llama, torch.device("cuda"), "auto")
        assert words == "norm, RoPE and SwiGLU of liger-kernel, frozen norms of our own"
        rotary = modeling_llama.apply_rotary_pos_emb
        assert modeling_llama.LlamaRMSNorm is norm and isinstance(rotary, Rotary)
        assert rotary.own is own and rotary.turn is not None
        assert rotary.kernel(1, 2, 3, 4) == "kernel"
        assert list(inspect.signature(rotary).parameters)[:4] == ["q", "k", "cos", "sin"]  # as kv caches ask
    logits = tiny_llama(input_ids=torch.arange(8)[None]).logits  # on a CPU, by its own function
    assert torch.isfinite(logits).all()


def test_nothing_writes_over_outputs_that_are_kept(tiny_llama: LlamaForCausalLM, liger: list[dict[str, Any]]) -> None:
    words = fuse_layers(tiny_llama, torch.device("cuda"), "auto", keeps_outputs=True)
    assert words == "norm and RoPE of liger-kernel, frozen norms of our own"
    fuse_layers(tiny_llama, torch.device("cuda"), "auto")
    first, second = liger
    assert first == second | {"swiglu": False, "geglu": False, "relu_squared": False} and "swiglu" not in second


def test_without_a_gpu_the_models_own_layers_stay(tiny_llama: LlamaForCausalLM) -> None:
    assert fuse_layers(tiny_llama, torch.device("cpu"), "auto") == "the model's own: fused kernels need a GPU"
    assert fuse_layers(tiny_llama, torch.device("cpu"), "none") == "the model's own (model.fused=none)"


def test_absent_back_ends_are_not_warned_about(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for _ in range(2):
        assert "pip install 'qtrain[gpu]'" in fuse_layers(tiny_llama, torch.device("cuda"), "auto")
    log = logging.getLogger(REGISTRY)
    log.warning("Backend impl '%s' for op '%s' could not be imported: %s: %s", "a", "rms_norm", "ImportError", "b")
    log.warning("op '%s' has no implementation", "rms_norm")
    assert caplog.messages == ["op 'rms_norm' has no implementation"] and len(log.filters) == 1


@pytest.mark.parametrize("keeps_outputs", [False, True])
def test_the_real_one(keeps_outputs: bool, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    rotary = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # back after the test
    before = dict(vars(modeling_llama))
    fuse_layers(tiny_llama, torch.device("cuda"), "auto", keeps_outputs=keeps_outputs)
    changed = {name for name, value in vars(modeling_llama).items() if before.get(name) is not value}
    assert changed == {"apply_rotary_pos_emb"}
    assert modeling_llama.apply_rotary_pos_emb.own is rotary
    assert modeling_llama.apply_rotary_pos_emb.turn is liger_turn
    makers = {layer.mlp.forward.__func__.__module__.split(".")[0] for layer in tiny_llama.model.layers}
    assert makers == {"transformers" if keeps_outputs else "liger_kernel"}
