"""Layers that multiply on their levels: values, gradients, and what they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.quant_conv import QuantConv2d
from qtrain.modules.quant_embedding import QuantEmbedding
from qtrain.modules.quant_linear import QuantLinear

ROWS = {"format": "int4"}
GROUPS = {"format": "int4", "group_size": 32}
LSQ = {"format": "int4", "group_size": 32, "range": "learned", "calibrate": "mse"}
TOKENS = {"format": "int8"}
KEPT = {"format": "int8", "range": "learned", "calibrate": "mse"}


def layer(weight: dict[str, Any] | None, activation: dict[str, Any] | None, bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    made = QuantLinear.from_linear(
        nn.Linear(64, 48, bias),
        None if weight is None else WeightSection.model_validate(weight),
        None if activation is None else QuantizerSection.model_validate(activation),
    )
    if made.input_quantizer is not None and not made.input_quantizer.ready:
        made.input_quantizer.observe()
        made(torch.randn(8, 64))
        made.input_quantizer.settle()
    return made


@pytest.mark.parametrize("activation", [None, TOKENS, KEPT])
@pytest.mark.parametrize("weight", [None, ROWS, GROUPS, LSQ, {"format": "fp8_e4m3"}])
def test_fused_is_the_composition_of_its_quantizers(
    weight: dict[str, Any] | None, activation: dict[str, Any] | None
) -> None:
    one = layer(weight, activation)
    x = torch.randn(2, 5, 64).requires_grad_()
    fused = one(x)
    quantized_x = x if one.input_quantizer is None else one.input_quantizer(x)
    composed = F.linear(quantized_x, one.quantized_weight(), one.bias)
    assert torch.equal(fused, composed)
    inputs = [x, *one.parameters()]
    upper = torch.randn_like(fused)
    for found, expected in zip(
        torch.autograd.grad(fused, inputs, upper), torch.autograd.grad(composed, inputs, upper), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def saved_bytes(run: Any, held: list[Tensor]) -> int:
    """Bytes of storage that autograd saves beyond what the caller holds."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("activation", [None, TOKENS, KEPT])
@pytest.mark.parametrize("weight", [ROWS, GROUPS, LSQ])
def test_nothing_is_saved_beyond_inputs_and_parameters(
    weight: dict[str, Any], activation: dict[str, Any] | None
) -> None:
    one = layer(weight, activation)
    x = torch.randn(7, 64, requires_grad=True)
    assert saved_bytes(lambda: one(x), [x, *one.parameters()]) == 0


def test_a_min_max_quantizer_saves_nothing_at_all() -> None:
    one = layer(ROWS, None)
    assert one.weight_quantizer is not None
    quantizer = one.weight_quantizer
    assert saved_bytes(lambda: quantizer(one.weight), []) == 0


def test_under_autocast_the_product_is_the_consumers() -> None:
    one = layer(GROUPS, TOKENS)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one(x)
    codes, qparams = one.codes()
    assert one.weight_quantizer is not None and one.input_quantizer is not None and one.bias is not None
    weight = one.weight_quantizer.dequantize(codes, qparams, torch.bfloat16)
    assert torch.equal(found, F.linear(one.input_quantizer(x.bfloat16()), weight, one.bias.bfloat16()))
    found.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and one.weight.grad is not None


def test_off_is_the_plain_layer_bit_for_bit() -> None:
    one = layer(GROUPS, TOKENS)
    assert one.weight_quantizer is not None and one.input_quantizer is not None
    one.weight_quantizer.enabled = one.input_quantizer.enabled = False
    x = torch.randn(5, 64)
    assert torch.equal(one(x), F.linear(x, one.weight, one.bias))


def test_adapters_train_inside_the_quantizer() -> None:
    one = layer(GROUPS, None, bias=False)
    before = one.codes()[0]
    one.add_adapter(4, 8.0)
    assert torch.equal(one.codes()[0], before)
    x = torch.randn(16, 64)
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        one(x).square().sum().mul(0.1).backward()
        optimizer.step()
    assert one.weight.grad is None and one.lora_A is not None and one.lora_B is not None
    codes, qparams = one.codes()
    assert bool((codes != before).any())
    assert one.weight_quantizer is not None
    # What is exported is the sum's levels, and the layer multiplies with nothing else.
    assert torch.equal(one(x), F.linear(x, one.weight_quantizer.dequantize(codes, qparams)))
    merged = one.weight + 2.0 * one.lora_B @ one.lora_A
    assert torch.allclose(one.merged_weight(), merged, atol=1e-6)


def test_to_linear_multiplies_the_same_numbers() -> None:
    one = layer(LSQ, None)
    x = torch.randn(3, 64)
    assert torch.equal(one.to_linear()(x), one(x))


@pytest.mark.parametrize("weight", [ROWS, {"format": "int8", "range": "learned"}, {"format": "int8", "group_size": 8}])
def test_an_embedding_looks_up_levels(weight: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(20, 16, padding_idx=3)
    one = QuantEmbedding.from_embedding(plain, WeightSection.model_validate(weight))
    ids = torch.tensor([[1, 3, 19], [0, 1, 1]])
    assert torch.equal(one(ids), F.embedding(ids, one.quantized_weight()))
    assert one.weight is plain.weight
    one(ids).sum().backward()
    assert plain.weight.grad is not None and bool((plain.weight.grad[3] == 0).all())
    # A learned range may clip a row at its largest number, by the rounding of its scale.
    assert int((plain.weight.grad[1] == 3).sum()) >= 15


def test_a_convolution_has_a_scale_for_each_channel() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    one = QuantConv2d.from_conv(plain, WeightSection(format="int4"), QuantizerSection(format="int8"))
    x = torch.randn(2, 4, 5, 5)
    codes, qparams = one.codes()
    assert codes.shape == plain.weight.shape and qparams.scale.shape == (6, 1)
    assert one.input_quantizer is not None
    assert torch.equal(one(x), F.conv2d(one.input_quantizer(x), one.quantized_weight(), padding=1))
    assert one.input_quantizer.qparams(x).scale.numel() == 1


def test_one_input_of_several_layers_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.kernels import quantized_linear as module

    calls: list[tuple[int, ...]] = []
    forward = module.forward

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return forward(x, *rest)

    monkeypatch.setattr(module, "forward", counted)
    q, k = layer(None, TOKENS), layer(None, TOKENS)
    x = torch.randn(5, 64, requires_grad=True)
    first = (q(x), k(x))
    assert calls == [(5, 64)]
    with torch.no_grad():
        x.mul_(2.0)  # another content in the same place
    second = (q(x), k(x))
    assert calls == [(5, 64)] * 2
    assert torch.allclose(second[0], 2 * first[0] - q.bias, atol=1e-5)  # levels scale with their input
    other = torch.randn(5, 64)
    assert torch.equal(q(other), F.linear(q.input_quantizer(other), q.weight, q.bias))  # type: ignore[misc]


@pytest.mark.parametrize("kernels", ["triton", "int8"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_inputs_are_shared_until_the_backward_is_over(
    kernels: str, recompute: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward quantizes it once for both layers, a backward once more at most, and then nothing is held of it."""
    from qtrain.kernels import int8_linear, quantized_linear, shared_input

    calls: list[tuple[int, ...]] = []

    def counted(made: Any) -> Any:
        return lambda x, *rest, **named: calls.append(tuple(x.shape)) or made(x, *rest, **named)

    for module, name in ((int8_linear, "codes"), (int8_linear, "numbers"), (quantized_linear, "forward")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    q, k = layer(ROWS, TOKENS), layer(ROWS, TOKENS)
    for one in (q, k):
        one.kernels = kernels  # type: ignore[assignment]
    for _ in range(2):
        calls.clear()
        x = torch.randn(5, 64, requires_grad=True)
        h = 2 * x
        memory = StorageWeakRef(h.untyped_storage())

        def both(h: Tensor) -> Tensor:
            return q(h) + k(h)

        y = checkpoint(both, h, use_reentrant=False) if recompute else both(h)
        assert calls.count((5, 64)) == 1
        y.sum().backward()
        assert calls.count((5, 64)) <= 1 + recompute + (kernels == "int8")
        del h, y
        assert memory.expired() and not any(latest._made is not None for latest in shared_input._ALL)
        if fails:  # a backward that never ended is no obstacle to the next
            h = 2 * x
            h.register_hook(lambda gradient: gradient.view(-1, 999))
            with pytest.raises(RuntimeError):
                both(h).sum().backward()


def test_shared_casts_sum_their_gradients() -> None:
    q, k = layer(ROWS, TOKENS), layer(ROWS, None)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (q(x).float().sum() + k(x).float().sum()).backward()
    assert x.grad is not None
    both = x.grad.clone()
    x.grad = None
    for one in (q, k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one(x).float().sum().backward()
    assert torch.allclose(both, x.grad, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            q(x)
        assert q(x).requires_grad  # a cast made without gradients serves no pass with them


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace:UserWarning")
def test_a_whole_decoder_layer_compiles_without_a_break(tiny_llama: Any) -> None:
    from qtrain.modules.kv.config import KVCacheSection
    from qtrain.modules.kv.prepare import prepare_kv
    from qtrain.modules.prepare import prepare_modules

    torch._dynamo.reset()
    weight = WeightSection(format="int4", group_size=32, range="learned")
    prepare_modules(tiny_llama, weight=weight, activation=QuantizerSection(format="int8"))
    prepare_kv(tiny_llama, KVCacheSection(format="int4", symmetric=False, site="pre_rope", share="per_token"))
    block, hidden = tiny_llama.model.layers[0], torch.randn(2, 6, 64)
    position = torch.arange(6)[None]
    angles = tiny_llama.model.rotary_emb(hidden, position)

    def run(x: Tensor) -> Tensor:
        found = block(x, position_embeddings=angles, position_ids=position, attention_mask=None)
        return found[0] if isinstance(found, tuple) else found

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        x = hidden.clone().requires_grad_()
        y = function(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        results.append((y.detach(), x.grad, gradients))
        block.zero_grad()
    (eager, d_eager, g_eager), (other, d_other, g_other) = results
    assert torch.equal(eager, other)
    assert d_eager is not None and d_other is not None and torch.allclose(d_eager, d_other, rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(g_eager, g_other, strict=True))
