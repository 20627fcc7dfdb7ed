"""The walk on a CUDA device: the same folds, and the same losses, as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.awq import Awq
from qtrain.ptq.config import AwqSection, SmoothQuantSection
from qtrain.ptq.smoothquant import SmoothQuant
from qtrain.ptq.start import Start
from qtrain.ptq.walk import quantize_blocks

pytestmark = pytest.mark.gpu


def rewrite(name: str, linear: nn.Linear, record: LinearRecord) -> None:
    linear.weight.data.copy_(record.dequantize(linear.weight.dtype))


@pytest.mark.parametrize("start", [Awq(AwqSection(grid=5)), SmoothQuant(SmoothQuantSection())])
def test_both_devices_agree(tiny_llama: LlamaForCausalLM, start: Start[Any]) -> None:
    for layer in tiny_llama.model.layers:
        layer.input_layernorm.weight.data[:4] = 12.0
    text = [torch.randint(4, 500, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 40)]
    specs = {n: QuantSpec("int4", group_size=32) for n, m in tiny_llama.named_modules() if isinstance(m, nn.Linear)}
    models = [tiny_llama, nn.Module.to(copy.deepcopy(tiny_llama), "cuda")]
    losses = [quantize_blocks(model, specs, start, text, place=rewrite) for model in models]
    for one, other in zip(*losses, strict=True):
        assert one.name == other.name
        assert other.error == pytest.approx(one.error, rel=0.05)
    for model in models:
        assert all(parameter.device.type == next(model.parameters()).device.type for parameter in model.parameters())
    head = [model.model.norm.weight.detach().cpu() for model in models]
    assert torch.equal(*head)
