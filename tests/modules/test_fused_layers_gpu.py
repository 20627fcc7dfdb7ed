"""Every method with liger-kernel's layers and without, on a CUDA device: the same gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.methods.method import build_method
from qtrain.models.fused import fuse_layers

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
IDS = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(0))
ROWS = ("method.name=peqa", "method.init=rtn", "method.weight.format=int4")
GROUPS = ("method.weight.group_size=32", "method.weight.symmetric=false")
ZERO_POINTS = ("method.weight.symmetric=false", "method.zero_points=true")
LORA = ("method.name=qlora", "method.r=8")
METHODS: dict[str, tuple[tuple[str, ...], float]] = {
    "peqa-rows": (ROWS, 1e-3),
    "peqa-groups": ((*ROWS, *GROUPS), 1e-3),
    "peqa-zero-points": ((*ROWS, *ZERO_POINTS), 1e-3),
    "qlora": (LORA, 1e-3),
    "qlora-int8": ((*LORA, "method.base=int8"), 1e-2),
    "lora": ((*LORA, "method.base=none"), 1e-3),
    "qat": (("method.name=qat", "method.weight.group_size=32"), 1e-2),  # a code may fall the other way
}


def model_of(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, attn_implementation="sdpa", **sizes))


def gradients(keys: tuple[str, ...], fused: str) -> tuple[dict[str, Tensor], str]:
    method = build_method(load_recipe(None, "model.path=none", *keys).method)
    model = model_of().to(DEVICE)
    words = fuse_layers(model, DEVICE, fused, keeps_outputs=method.keeps_outputs)
    torch.manual_seed(1)
    trained = method.prepare(model, compute_dtype=torch.float32, device=DEVICE).train()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:  # zeros hide what reaches A
            torch.nn.init.normal_(parameter, std=0.02)
    words += f"; {method.fuse(trained, nullcontext)}" if fused == "auto" else ""
    logits = trained(input_ids=IDS.to(DEVICE)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten().to(DEVICE)).backward()
    return {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}, words


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_models_own_layers(name: str) -> None:
    pytest.importorskip("liger_kernel")
    keys, tolerance = METHODS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        wanted, _ = gradients(keys, "none")
        found, words = gradients(keys, "auto")
    finally:
        torch.set_float32_matmul_precision(before)
    assert "of liger-kernel" in words and "results that differ" not in words
    assert found.keys() == wanted.keys()
    far = {n: float((found[n] - own).norm() / own.norm().clamp(min=1e-30)) for n, own in wanted.items()}
    assert max(far.values()) <= tolerance, sorted(far.items(), key=lambda one: -one[1])[:5]
