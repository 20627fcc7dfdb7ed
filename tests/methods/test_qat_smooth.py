"""`method.kv_cache.smooth` inside of quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.errors import DataError
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.modules.quantizers import full_precision

CACHE = {"format": "int4", "symmetric": False, "smooth": True}
IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
PLACE: dict[str, Any] = {"compute_dtype": torch.float32, "device": torch.device("cpu")}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3::16] *= 8
    return model


def text(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (1, 24), generator=generator) for _ in range(count)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("init", [None, "gptq"])
def test_full_precision_stays_and_the_run_restores(init: str | None, tmp_path: Path) -> None:
    weight = {"format": "int8", "range": "learned"} if init else None
    options = QatOptions(weight=weight, init=init, kv_cache=CACHE, calibration_rows=4)
    plain = logits(tiny())
    method = build_method(options)
    model = method.prepare(tiny(), text=text, **PLACE)
    assert any(line.startswith("smoothed    keys of 2 blocks") for line in method.lines(model))
    with method.baselines(model)["full"]():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-3)
    method.save(model, tmp_path / "weights")
    other = build_method(options)
    again = other.prepare(tiny(), text=None, restoring=True, **PLACE)
    other.restore(again, tmp_path / "weights")
    assert torch.equal(logits(again), logits(model))
    with full_precision(model):
        assert not torch.equal(logits(model), logits(again))


def test_it_wants_text() -> None:
    with pytest.raises(DataError, match=r"kv_cache.smooth=true looks at text.*\n.*\n.*smooth=false"):
        build_method(QatOptions(weight=None, kv_cache=CACHE)).prepare(tiny(), **PLACE)


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match="smooth with lora"):
        QatOptions(kv_cache=CACHE, lora={})
    with pytest.raises(ValueError, match="calibration_rows=32"):
        QatOptions(kv_cache=CACHE, calibration_rows=0)
