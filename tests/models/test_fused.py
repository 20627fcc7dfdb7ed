"""Fused layers: what is said where there are none, and what of liger-kernel's log is kept off the screen."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from qtrain.models.fused import fuse_layers

REGISTRY = "liger_kernel.backends.registry"


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
