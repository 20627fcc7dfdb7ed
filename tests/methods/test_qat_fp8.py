"""QAT of fp8 weights and inputs as products of fp8 codes: the training of the simulated one, chosen where it runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.kernels import int8_linear as kernel
from qtrain.kernels.codes import codes as own_codes
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules import kernel_choice
from qtrain.modules.kernel_choice import kernel_lines, use_kernels
from qtrain.modules.plain_levels import plain_levels
from qtrain.modules.quant_linear import QuantLinear

FP8 = {"weight": {"format": "fp8_e4m3"}, "activation": {"format": "fp8_e4m3"}}
INT8 = {"weight": {"format": "int8"}, "activation": {"format": "int8"}}


def prepared(model: Any, **keys: Any) -> Qat:
    method = Qat(QatOptions.model_validate({"name": "qat", **FP8, **keys}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    return method


def step(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(24).view(2, 12) * 7 % 400
    loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    error = sum(float((found[name] - own).norm()) ** 2 for name, own in wanted.items())
    return float(error / sum(float(own.norm()) ** 2 for own in wanted.values())) ** 0.5


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, units: bool) -> None:
    """Layers are chosen and described as if they lay on one."""
    monkeypatch.setattr(kernel_choice, "_device", lambda layer: torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if units else (8, 0))
    monkeypatch.setattr("qtrain.kernels.fp8_product._capability", lambda index: (9, 0) if units else (8, 0))
    monkeypatch.setattr(kernel_choice, "code_rows", object())
    monkeypatch.setattr(kernel_choice, "tensor_core_words", lambda device: "int8 tensor cores")


def test_a_model_of_fp8_trains_as_the_simulated_one(tiny_llama: Any) -> None:
    prepared(tiny_llama)
    codes = {n: m.codes()[0].float() for n, m in tiny_llama.named_modules() if isinstance(m, QuantLinear)}
    wanted = step(tiny_llama)
    use_kernels(tiny_llama, "fp8")
    found = step(tiny_llama)
    assert torch.allclose(found["loss"], wanted["loss"], rtol=1e-5)
    # A sum that falls on the other side of a code's edge moves one code of an input, by 1 / 16 of it.
    assert 0 < apart(found, wanted) < 0.01
    assert len(codes) == 14
    assert all(torch.equal(codes[n], m.codes()[0].float()) for n, m in tiny_llama.named_modules() if n in codes)


def test_an_input_of_several_layers_becomes_fp8_once(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(x: Tensor, key: str, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        seen.append(key)
        return own_codes(x, key, *rest, **named)

    prepared(tiny_llama, kernels="fp8")
    monkeypatch.setattr(kernel, "codes", counted)
    with torch.no_grad():
        tiny_llama(input_ids=torch.arange(8)[None], use_cache=False)
    inputs = [key for key in seen if "per_token" in key]
    assert len(inputs) == 2 * 4 and len(seen) == 2 * (4 + 7)  # of q, k and v; o; gate and up; down


@pytest.mark.parametrize("inputs", ["per_token", "per_tensor"])
def test_blocks_give_what_their_layers_give(inputs: str, tiny_llama: Any) -> None:
    method = prepared(tiny_llama, kernels="fp8", activation={"format": "fp8_e4m3", "granularity": inputs})
    wanted = step(tiny_llama)
    assert method.fuse(tiny_llama, nullcontext) == "2 QKV and 2 MLP as one function"
    found = step(tiny_llama)
    assert torch.equal(found["loss"], wanted["loss"]) and apart(found, wanted) <= 3e-6


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "simulated products (method.kernels=fp8: codes of 14 layers); levels"),
        ({"kernels": "fp8"}, "fp8 products in 14 layers (the same numbers in fp32: no fp8 units here); levels"),
        ({"kernels": "int8"}, "int8 products in 0 layers (torch's integer product), simulated in 14: inputs are fp8"),
        (
            {"kernels": "fp8", "rules": {"*.down_proj": {"weight": {"group_size": 32}}}},
            "fp8 products in 12 layers (the same numbers in fp32: no fp8 units here), simulated in 2: weights have "
            "scales per_group, neither one a row nor one for all",
        ),
        (
            {"kernels": "fp8", "activation": {"format": "fp8_e4m3", "range": "static"}},
            "fp8 products in 0 layers (the same numbers in fp32: no fp8 units here), simulated in 14: inputs are not "
            "dynamic by token, or as a whole",
        ),
        ({"kernels": "fp8", "rules": {"*.o_proj": INT8}}, "simulated in 2: inputs are int8, not fp8_e4m3"),
    ],
)
def test_the_path_is_said(keys: dict[str, Any], words: str, tiny_llama: Any) -> None:
    (line,) = [line for line in prepared(tiny_llama, **keys).lines(tiny_llama) if line.startswith("kernels")]
    assert words in line


@pytest.mark.parametrize(
    ("units", "keys", "words"),
    [
        (True, {}, "fp8 products in 14 layers (fp8 tensor cores); levels"),
        (True, {"rules": {"*.o_proj": INT8}}, "int8 products in 2 layers (int8 tensor cores), fp8 products in 12 "),
        (False, {}, "simulated products (no fp8 units here for 14 layers); levels"),
        (
            False,
            {"rules": {"*.o_proj": INT8}},
            "int8 products in 2 layers (int8 tensor cores), simulated in 12: no fp8 units here; levels",
        ),
        (True, {"weight": {"format": "fp8_e5m2"}}, "simulated in 14: weights are fp8_e5m2, not fp8_e4m3; levels"),
        (True, {"activation": None}, "int8 products in 0 layers (int8 tensor cores), simulated in 14: inputs are not"),
    ],
)
def test_a_gpu_gets_what_it_has_units_for(
    units: bool, keys: dict[str, Any], words: str, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, units=units)
    prepared(tiny_llama, **keys)
    (line,) = kernel_lines(tiny_llama)
    assert words in line


def test_a_width_that_units_do_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, units=True)
    layers = [torch.nn.Linear(32, out) for out in (48, 40)]
    sections = QatOptions.model_validate({"name": "qat", **FP8})
    model = torch.nn.ModuleList(
        QuantLinear.from_linear(layer, sections.weight, sections.activation) for layer in layers
    )
    use_kernels(model, "auto")
    line = kernel_lines(model)[0]
    assert "fp8 products in 1 layers (fp8 tensor cores), simulated in 1: widths of 32 x 40 are no multiples" in line
    x = torch.randn(3, 32)
    for layer, plain in zip(model, layers, strict=True):
        assert (layer(x) - plain(x)).norm() < 0.1 * plain(x).norm()  # and both run


def test_levels_by_plain_pytorch_are_named(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    on_a_gpu(monkeypatch, units=True)
    rules = {"*.o_proj": {"activation": {"format": "int8", "range": "static"}}}
    cache = {"format": "int4", "range": "static", "key": {"format": "fp8_e4m3"}}
    prepared(tiny_llama, rules=rules, kv_cache=cache)
    line = kernel_lines(tiny_llama)[0]
    assert line.endswith(
        "levels by one-pass kernels, plain for 2 inputs of int8 per_tensor static, plain for 2 keys of fp8_e4m3 "
        "per_tensor static, plain for 2 values of int4 per_tensor static"
    )


def test_fp8_by_rows_is_known_to_the_one_pass_kernels(tiny_llama: Any) -> None:
    pytest.importorskip("triton")
    prepared(tiny_llama, kv_cache={"format": "fp8_e5m2", "group_size": 8})
    layers = [module for module in tiny_llama.modules() if isinstance(module, QuantLinear)]
    assert plain_levels(tiny_llama, layers) == {}


def test_gradients_in_bytes_are_of_int8_alone() -> None:
    with pytest.raises(ValueError, match="kernels: int8"):
        QatOptions.model_validate({"name": "qat", **FP8, "kernels": "fp8", "input_gradient": "int8"})


@pytest.mark.gpu
def test_on_a_gpu_it_runs_by_itself(tiny_llama: Any) -> None:
    method = Qat(QatOptions.model_validate({"name": "qat", **FP8}))
    method.prepare(tiny_llama, compute_dtype=torch.bfloat16, device=torch.device("cuda"))
    assert "fp8 products in 14 layers (fp8 tensor cores); levels by one-pass kernels" in kernel_lines(tiny_llama)[0]
    ids = torch.arange(24, device="cuda").view(2, 12) * 7 % 400
    losses, gradients = [], []
    for kernels in ("fp8", "triton", "plain"):
        use_kernels(tiny_llama, kernels)  # type: ignore[arg-type]
        tiny_llama.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = tiny_llama.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in tiny_llama.named_parameters() if p.grad is not None})
    assert losses == pytest.approx([losses[2]] * 3, rel=5e-3)
    assert apart(gradients[1], gradients[2]) < 1e-3 and apart(gradients[0], gradients[2]) < 0.1
