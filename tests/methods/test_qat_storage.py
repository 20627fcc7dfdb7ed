"""QAT whose weights are kept in bf16: what is kept how, and that its codes are the deployed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.errors import ErrorList
from qtrain.methods.method import build_method
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules.quant_linear import QuantLinear
from qtrain.training.stochastic_adamw import StochasticAdamW

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
W8A8: dict[str, Any] = {"weight": {"format": "int8"}, "activation": {"format": "int8"}}
SPECS: dict[str, dict[str, Any]] = {
    "w8a8": W8A8,
    "bytes": {**W8A8, "kernels": "int8"},
    "learned": {"weight": {"format": "int4", "range": "learned"}},
    "groups": {
        "weight": {"format": "int4", "group_size": 32, "symmetric": False},
        "embedding": {"format": "int8"},
        "head": True,
    },
}


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied))


def prepared(tied: bool = False, compute: torch.dtype = BF16, **keys: Any) -> tuple[Qat, LlamaForCausalLM]:
    method = build_method(QatOptions.model_validate({"name": "qat", "weight_storage": "bf16", **keys}))
    assert isinstance(method, Qat)
    model = method.prepare(tiny(tied), compute_dtype=compute, device=CPU)
    assert isinstance(model, LlamaForCausalLM)
    return method, model.train()


def rows(seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(seed))


def layers(model: LlamaForCausalLM) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def train(method: Qat, model: LlamaForCausalLM, steps: int) -> None:
    optimizer = StochasticAdamW(method.parameter_groups(model, 1e-3), lr=1e-3, moments=BF16)
    for step in range(steps):
        with torch.autocast("cpu", dtype=BF16):
            model(input_ids=rows(step), labels=rows(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_in_bf16_and_the_rest_in_fp32(tied: bool) -> None:
    method, model = prepared(tied, **SPECS["learned"])
    for name, parameter in model.named_parameters():
        small = "norm" in name or name.endswith("scale")
        assert parameter.dtype == (FP32 if small else BF16), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.autocast("cpu", dtype=BF16):
        model(input_ids=rows(), labels=rows()).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    (line,) = (line for line in method.lines(model) if line.startswith("stored"))
    assert "in bf16, rounded by chance" in line


def test_where_products_are_in_fp32_it_says_that_nothing_is_in_bf16() -> None:
    method, model = prepared(compute=FP32, **W8A8)
    assert {parameter.dtype for parameter in model.parameters()} == {FP32}
    assert "stored      in fp32: products are made in fp32 here" in method.lines(model)


@pytest.mark.parametrize("name", SPECS)
def test_the_codes_of_training_are_the_codes_of_export(name: str, tmp_path: Path) -> None:
    method, model = prepared(**SPECS[name])
    train(method, model, 3)
    seen: dict[str, Tensor] = {}
    for key, layer in layers(model).items():
        layer.register_forward_pre_hook(lambda layer, _, key=key: seen.update({key: layer.quantized_weight().detach()}))
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        model(input_ids=rows())
    method.save(model, tmp_path / "weights")
    # Where it is exported products may be in fp32, and weights are then held so.
    for compute in (BF16, FP32):
        other, loaded = prepared(compute=compute, **SPECS[name])
        other.restore(loaded, tmp_path / "weights")
        records = {it.name: it.record() for it in other.deployed(loaded, dtype=BF16).tensors() if it.record is not None}
        found = 0
        for key, layer in layers(model).items():
            assert layer.weight_quantizer is not None
            codes, qparams = layer.codes()
            assert torch.equal(layer.weight_quantizer.dequantize(codes, qparams, BF16), seen[key])
            if f"{key}.weight" in records:
                record = records[f"{key}.weight"]
                assert torch.equal(record.codes, codes) and torch.equal(record.scale, qparams.scale)
                found += 1
        assert found == 14


@pytest.mark.parametrize(("name", "symmetric"), [("int8", True), ("int4", False)])
def test_codes_of_a_start_are_not_lost_on_the_way_to_bf16(name: str, symmetric: bool) -> None:
    keys: dict[str, Any] = {
        "weight": {"format": name, "range": "learned", "symmetric": symmetric, "group_size": 32},
        "init": "hqq",
    }
    _, exact = prepared(weight_storage="fp32", **keys)
    _, model = prepared(**keys)
    plain = {key: layer.weight.to(BF16).float() for key, layer in layers(exact).items()}
    moved = 0
    for key, layer in layers(model).items():
        wanted, _ = layers(exact)[key].codes()
        assert layer.weight.dtype == BF16 and torch.equal(layer.codes()[0], wanted)
        moved += int((layer.weight.float() != plain[key]).sum())
    assert 0 < moved < 0.2 * sum(weight.numel() for weight in plain.values())


def test_weights_that_do_not_train_are_refused() -> None:
    with pytest.raises(ErrorList, match="under lora they are frozen as stored"):
        load_recipe(None, "method.name=qat", "method.weight_storage=bf16", "method.lora.r=4")
