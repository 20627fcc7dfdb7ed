"""The frozen base multiplies with exactly the weight that is reported, before and after any forward."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from qtrain.modules.frozen_linear import dense_weight, freeze_linear, linears, quantize_base

CPU = torch.device("cpu")
FOUR_BITS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
BASES = [*FOUR_BITS, ("int8", True)]

# LLM.int8() runs its product in fp16, and says so once for each call.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")


def linear(out_features: int = 96, in_features: int = 128, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(3)
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def frozen(
    base: str, double_quant: bool, layer: nn.Linear | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    return freeze_linear(
        layer if layer is not None else linear(), base, double_quant=double_quant, compute_dtype=dtype, device=CPU
    )


def stored(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of every byte and figure that the weight consists of."""
    weight = layer.weight
    parts = {"data": weight.data}
    if isinstance(weight, bnb.nn.Params4bit):
        parts |= weight.quant_state.as_dict(packed=True)
    else:
        parts |= {"codes": layer.state.CB, "scales": layer.state.SCB}
    return {name: value.clone() for name, value in parts.items()}


@pytest.mark.parametrize(("base", "double_quant"), BASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_dense_weight_is_what_multiplies(base: str, double_quant: bool, training: bool) -> None:
    layer = frozen(base, double_quant).train(training)
    with torch.no_grad():
        product = layer(torch.eye(128)).t()  # x = identity: the product is the weight
    # int8 rounds the input to 8 bits as well; of an identity that is exact, but its result is fp16.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if base == "int8" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(dense_weight(layer), product.float(), **tolerance)


@pytest.mark.parametrize(
    ("base", "double_quant", "most"), [("nf4", True, 0.1), ("fp4", True, 0.13), ("int8", True, 0.01)]
)
def test_the_dense_weight_is_near_the_original(base: str, double_quant: bool, most: float) -> None:
    original = linear()
    weight = original.weight.detach().clone()
    error = (dense_weight(frozen(base, double_quant, original)) - weight).norm() / weight.norm()
    assert 0 < error < most


def test_double_quantization_changes_the_scales_alone() -> None:
    single, double = frozen("nf4", False), frozen("nf4", True)
    assert torch.equal(single.weight.data, double.weight.data)
    assert not torch.equal(dense_weight(single), dense_weight(double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "double_quant"), BASES)
def test_evaluation_leaves_the_stored_weight(base: str, double_quant: bool, dtype: torch.dtype) -> None:
    # On CPUs with AVX512-BF16 bitsandbytes repacks a weight at its first forward in eval mode, scales in bf16.
    layer = frozen(base, double_quant, dtype=dtype).eval()
    before, weight = stored(layer), dense_weight(layer)
    x = torch.randn(5, 128)
    with torch.no_grad():
        first = layer(x)
        again = layer(x)
    after = stored(layer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(weight, dense_weight(layer))
    assert torch.equal(first, again)
    if base != "int8":  # on a CPU bitsandbytes rounds the inputs of an int8 layer in eval mode alone
        with torch.no_grad():
            assert torch.equal(layer.train()(x), first)


@pytest.mark.parametrize(("base", "double_quant"), FOUR_BITS)
def test_repacking_on_some_processors_is_switched_off(base: str, double_quant: bool) -> None:
    assert frozen(base, double_quant).support_avx512bf16_for_cpu is False


@pytest.mark.parametrize(("base", "double_quant"), BASES)
def test_biases_are_kept_and_nothing_trains(base: str, double_quant: bool) -> None:
    original = linear(bias=True)
    bias = original.bias.detach().clone()
    layer = frozen(base, double_quant, original)
    assert torch.equal(layer.bias, bias)
    with torch.no_grad():
        product = layer(torch.zeros(1, 128))
    torch.testing.assert_close(product[0], bias, rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_without_a_bias_there_is_none(base: str) -> None:
    assert frozen(base, True).bias is None


@pytest.mark.parametrize(("base", "double_quant"), BASES)
def test_the_gradient_of_the_input_goes_through_the_same_weight(base: str, double_quant: bool) -> None:
    layer = frozen(base, double_quant)
    x = torch.randn(4, 128, requires_grad=True)
    upstream = torch.randn(4, 96)
    layer(x).backward(upstream)
    assert x.grad is not None
    expected = upstream @ dense_weight(layer)
    assert (x.grad - expected).norm() / expected.norm() < (5e-3 if base == "int8" else 1e-5)


def test_nf4_with_double_quantization_takes_4_127_bits() -> None:
    layer = frozen("nf4", True, linear(1024, 1024))
    state = layer.weight.quant_state
    scales, code = state.state2.absmax, state.code
    stored_bytes = layer.weight.numel() + state.absmax.numel() + 4 * scales.numel()
    assert (layer.weight.dtype, state.absmax.dtype, scales.dtype) == (torch.uint8, torch.uint8, torch.float32)
    assert code.numel() == 16
    assert stored_bytes * 8 / 1024**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-9)  # 4.127
    single = frozen("nf4", False, linear(1024, 1024)).weight
    assert (single.numel() + 4 * single.quant_state.absmax.numel()) * 8 / 1024**2 == 4.5


@pytest.mark.parametrize(("base", "double_quant"), BASES)
def test_the_whole_model_but_its_head(base: str, double_quant: bool, tiny_llama: LlamaForCausalLM) -> None:
    names = [name for name, _ in linears(tiny_llama)]
    assert len(names) == 14 and not any("lm_head" in name for name in names)
    kept = {name: p.detach().clone() for name, p in tiny_llama.named_parameters() if "proj" not in name}
    expected = {name: dense_weight(frozen(base, double_quant, layer)) for name, layer in linears(tiny_llama)}
    quantize_base(tiny_llama, base, double_quant=double_quant, compute_dtype=torch.float32, device=CPU)
    kind = bnb.nn.Linear8bitLt if base == "int8" else bnb.nn.Linear4bit
    for name in names:
        assert isinstance(tiny_llama.get_submodule(name), kind)
        assert torch.equal(dense_weight(tiny_llama.get_submodule(name)), expected[name])
    assert type(tiny_llama.lm_head) is nn.Linear
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= kept.keys()
    for name, value in kept.items():
        assert torch.equal(tiny_llama.get_parameter(name), value)


def test_the_16_bit_copies_are_let_go_one_after_the_other(tiny_llama: LlamaForCausalLM) -> None:
    held = dict(linears(tiny_llama))  # as a list of the layers to quantize does
    alive: list[int] = []

    def watched(layers: Iterator[tuple[str, nn.Linear]], total: int) -> Iterator[tuple[str, nn.Linear]]:
        assert total == 14
        for layer in layers:
            alive.append(sum(linear.weight.numel() > 0 for linear in held.values()))
            yield layer

    quantize_base(tiny_llama, "nf4", double_quant=True, compute_dtype=torch.float32, device=CPU, progress=watched)
    assert alive == list(range(14, 0, -1))
    assert not any(layer.weight.numel() for layer in held.values())


def test_a_plain_layer_is_its_own_weight() -> None:
    layer = linear().to(torch.bfloat16)
    weight = dense_weight(layer)
    assert weight.dtype == torch.float32 and not weight.requires_grad
    assert torch.equal(weight, layer.weight.detach().float())


@pytest.mark.parametrize(("base", "double_quant"), FOUR_BITS)
@pytest.mark.parametrize("shape", [(24, 48), (24, 72), (24, 96), (24, 128), (5, 48), (3, 160)], ids=str)
def test_rows_that_end_within_a_block(shape: tuple[int, int], base: str, double_quant: bool) -> None:
    """bitsandbytes (0.50) reads some of them on a CPU otherwise than it stored them."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    linear.weight *= torch.arange(1, shape[0] + 1).unsqueeze(1)  # so that blocks differ
    wanted = linear.weight.clone()
    frozen = freeze_linear(
        linear, base, double_quant=double_quant, compute_dtype=torch.float32, device=torch.device("cpu")
    )
    words, state = frozen.weight.data, frozen.weight.quant_state
    codes = torch.stack([words.flatten() >> 4, words.flatten() & 15], dim=1).flatten()[: wanted.numel()]
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    by_hand = (state.code[codes.int()] * absmax.repeat_interleave(64)[: wanted.numel()]).view(shape)
    assert torch.equal(dense_weight(frozen), by_hand)
    # Half of the widest step between two codes of the largest block.
    assert float((by_hand - wanted).abs().max()) <= 0.2 * float(wanted.abs().max())
    x, kept = torch.randn(7, shape[1], requires_grad=True), list[Tensor]()
    with saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = frozen(x)
    assert all(saved.dtype == torch.uint8 for saved in kept)
    torch.testing.assert_close(y, x @ by_hand.t() + linear.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, by_hand.sum(0).expand(7, -1))
    # fsdp2 gathers the codes as a plain parameter.
    frozen.weight = nn.Parameter(words, requires_grad=False)
    assert torch.equal(frozen(x), y)


def test_rows_that_end_within_a_block_are_rounded_once() -> None:
    linear = nn.Linear(96, 8, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    frozen = freeze_linear(linear, "nf4", double_quant=True, compute_dtype=torch.float32, device=torch.device("cpu"))
    read = frozen(torch.eye(96)).t()
    assert not torch.equal(read, read.bfloat16().float()) and torch.equal(read.bfloat16().float(), dense_weight(frozen))
