"""The arithmetic that a QAT run asks for: the same codes, the same training, and words that say which it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.errors import ConfigError
from qtrain.kernels import code_product, shared_input
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules import kernel_choice, token_loss
from qtrain.modules.convert import convert
from qtrain.modules.kernel_choice import kernel_lines, use_kernels
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.token_loss import choose_loss

W4A8 = {"weight": {"format": "int4", "range": "learned"}, "activation": {"format": "int8"}}


def prepared(model: Any, **keys: Any) -> Qat:
    method = Qat(QatOptions.model_validate({"name": "qat", **W4A8, **keys}))
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    return method


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(24).view(2, 12) * 7 % 400
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_of_bytes_trains_as_the_simulated_one(tiny_llama: Any) -> None:
    prepared(tiny_llama)
    codes = {n: m.codes()[0] for n, m in tiny_llama.named_modules() if isinstance(m, QuantLinear)}
    loss, gradients = step(tiny_llama)
    use_kernels(tiny_llama, "int8")
    other, others = step(tiny_llama)
    assert torch.allclose(loss, other, rtol=1e-5)
    assert gradients.keys() == others.keys()
    # A sum that falls on the other side of a code's edge moves one code of an input: 1 / 254 of its row's largest.
    error = sum((gradients[n] - others[n]).norm() ** 2 for n in gradients) ** 0.5
    assert float(error / sum(g.norm() ** 2 for g in gradients.values()) ** 0.5) < 0.01
    assert all(torch.equal(codes[n], m.codes()[0]) for n, m in tiny_llama.named_modules() if n in codes)
    use_kernels(tiny_llama, "int8", "int8")
    rounded = step(tiny_llama)[1]
    error = sum((gradients[n] - rounded[n]).norm() ** 2 for n in gradients) ** 0.5
    assert 1e-4 < float(error / sum(g.norm() ** 2 for g in gradients.values()) ** 0.5) < 0.1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "simulated products (method.kernels=int8 multiplies bytes in 14 layers)"),
        ({"kernels": "plain", "activation": None}, "simulated products; levels by plain PyTorch"),
        ({"kernels": "int8"}, "int8 products in 14 layers (torch's integer product); levels by plain PyTorch"),
        ({"kernels": "int8", "input_gradient": "int8"}, "(torch's integer product, gradients of inputs too)"),
        (
            {"kernels": "int8", "rules": {"*.down_proj": {"weight": {"group_size": 32}}}},
            "int8 products in 12 layers (torch's integer product), simulated in 2: weights have scales per_group",
        ),
        (
            {"kernels": "int8", "head": True, "rules": {"*.down_proj": {"weight": {"group_size": 32}}}},
            "int8 products in 12 layers (torch's integer product), simulated in 2: weights have scales per_group, not "
            "one a row, head simulated where the loss takes it in chunks; levels by plain PyTorch",
        ),
        ({"head": True}, "simulated products (method.kernels=int8 multiplies bytes in 14 layers)"),
        (
            {"kernels": "int8", "head": True, "rules": {"lm_head": {"activation": None}}},
            "int8 products in 14 layers (torch's integer product), simulated in 1: inputs are not quantized; levels by",
        ),
        ({"kernels": "int8", "rules": {"*.k_proj": {"activation": None}}}, "simulated in 2: inputs are not quantized"),
    ],
)
def test_the_path_is_said(keys: dict[str, Any], words: str, tiny_llama: Any) -> None:
    (line,) = [line for line in prepared(tiny_llama, **keys).lines(tiny_llama) if line.startswith("kernels")]
    assert words in line and line.endswith("one-pass kernels need a GPU") == (keys.get("kernels") != "plain")


def test_layers_that_are_said_to_multiply_bytes_do(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step of the training: the head of 512 rows is quantized, and no product of bytes has it."""
    method, rows = prepared(tiny_llama, kernels="int8", head=True), []
    product = code_product.int8_matmul
    monkeypatch.setattr(code_product, "int8_matmul", lambda *given: rows.append(len(given[1])) or product(*given))
    loss, words = choose_loss(tiny_llama)
    rows.clear()
    ids = torch.arange(24).view(2, 12)
    loss({"input_ids": ids, "labels": ids, "loss_tokens": torch.tensor(22)}).backward()
    assert words == "head and cross-entropy in chunks" and isinstance(tiny_llama.lm_head, QuantLinear)
    assert f"kernels     int8 products in {len(rows)} layers" in "\n".join(method.lines(tiny_llama))


def test_nothing_is_said_of_a_model_without_such_layers() -> None:
    assert kernel_lines(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_bytes_backward_need_bytes_forward(kernels: str) -> None:
    with pytest.raises(ValueError, match="kernels: int8"):
        QatOptions.model_validate({"name": "qat", **W4A8, "kernels": kernels, "input_gradient": "int8"})


def test_whether_auto_is_of_bytes_is_seen_on_the_device(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"name": "qat", **W4A8, "input_gradient": "int8"}
    method = Qat(QatOptions.model_validate(asked))
    keys: Any = {"compute_dtype": torch.float32}
    with pytest.raises(ConfigError, match=r"^method\.input_gradient=int8: .*auto is triton.*cpu") as caught:
        method.prepare(copy.deepcopy(tiny_llama), device=torch.device("cpu"), **keys)
    assert caught.value.rule and "method.kernels=int8" in str(caught.value.fix)
    # What was trained on a GPU is exported without one.
    method.prepare(copy.deepcopy(tiny_llama), device=torch.device("cpu"), restoring=True, **keys)
    monkeypatch.setattr(type(tiny_llama), "to", lambda self, **_: self)  # "a GPU" is a word here
    monkeypatch.setattr(kernel_choice, "_device", lambda layer: torch.device("cuda"))
    method.prepare(tiny_llama, device=torch.device("cuda"), **keys)
    layers = [layer for layer in tiny_llama.modules() if isinstance(layer, QuantLinear)]
    assert layers and all(layer.kernels == "int8" and layer.byte_gradient for layer in layers)


def test_what_is_converted_keeps_no_choice(tiny_llama: Any) -> None:
    prepared(tiny_llama, kernels="int8")
    convert(tiny_llama)
    linears = [module for module in tiny_llama.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and not any(hasattr(layer, "kernels") for layer in linears)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("gradient", ["full", "int8"])
def test_a_decoder_layer_of_bytes_compiles_without_a_break(gradient: str, tiny_llama: Any) -> None:
    torch._dynamo.reset()
    prepared(tiny_llama, kernels="int8", input_gradient=gradient)
    block, hidden = tiny_llama.model.layers[0], torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    position = torch.arange(6)[None]
    angles = tiny_llama.model.rotary_emb(hidden, position)

    def run(x: Tensor) -> Tensor:
        found: Any = block(x, position_embeddings=angles, position_ids=position, attention_mask=None)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return y

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x = hidden.clone().requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
        block.zero_grad()
    assert len(results[0]) == len(results[1]) and torch.equal(results[0][0], results[1][0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))


def test_nothing_of_an_input_is_held_where_logits_are_made(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in a validation, whose passes have no backward."""
    prepared(tiny_llama)
    loss, _ = choose_loss(tiny_llama)
    held: list[int] = []
    product = token_loss.linear_cross_entropy

    def look(*given: Any, **named: Any) -> Tensor:
        held.append(sum(latest._made is not None for latest in shared_input._ALL))
        return product(*given, **named)

    monkeypatch.setattr(token_loss, "linear_cross_entropy", look)
    ids = torch.arange(24).view(2, 12)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            loss({"input_ids": ids, "labels": ids, "loss_tokens": torch.tensor(22)})
    assert held == [0, 0]
