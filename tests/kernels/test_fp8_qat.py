"""Layers that multiply fp8 codes beside the simulated ones, float64 and Triton's interpreter (compiled on a GPU)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels import code_product
from qtrain.kernels import codes as codes_module
from qtrain.kernels.code_product import code_matmul
from qtrain.kernels.codes import codes, numbers, plain_codes
from qtrain.kernels.fp8_linear import fp8_linear, lacks_fp8_product
from qtrain.kernels.fp8_product import fp8_rows
from qtrain.kernels.int8_blocks import ByteLinear, int8_mlp, int8_products
from qtrain.kernels.quantized_linear import quantized_linear
from qtrain.numerics.affine import quantize
from qtrain.numerics.rules import CompatibleLLMQAT, Dynamic, Rule, Static
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")
ROUNDING = 2.0**-12 if ON_GPU else 2.0**-23
"""Of a sum: fp8 units keep 14 bits or so of 128 products."""


def fp8(granularity: Any, **changes: Any) -> QuantSpec:
    return QuantSpec(
        **{"format": "fp8_e4m3", "granularity": granularity, "group_size": None, "scale_dtype": "fp32"} | changes
    )


INPUTS = [fp8("per_token"), fp8("per_token", scale_dtype="bf16"), fp8("per_tensor")]
WEIGHTS = [fp8("per_channel", scale_dtype="bf16"), fp8("per_channel"), fp8("per_tensor", scale_dtype="fp16")]
RANGES: list[type[Rule]] = [Dynamic, Static]


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-4, 1, width)
    x[:1] = 0.0
    if count > 1 and width > 1:  # of a scale of 1: ties, subnormal codes, and what lies below them
        x[1] = torch.tensor([17.0, -19.0, 2.0**-10, 3 * 2.0**-10, 2.0**-11, -0.0, 449.0]).repeat(width)[:width]
        x[1, 0] = 448.0
    return x.to(DEVICE, dtype)


def kept_scale(rule: Rule, weight: Tensor) -> Tensor | None:
    if isinstance(rule, Dynamic):
        return None
    return (Dynamic(rule.spec).qparams(weight, None, None).scale.float() * 0.7).clone()


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """The same codes, where fp8 knows no ``torch.equal``, and scales."""
    return torch.equal(found[0].float(), wanted[0].float()) and torch.equal(found[1], wanted[1])


# ---------------------------------------------------------------- codes


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.sampled_from(INPUTS), st.sampled_from(["float32", "bfloat16", "float16"])
)
def test_codes_are_the_simulated_quantizers(count: int, width: int, spec: QuantSpec, dtype: str) -> None:
    x = rows(count, width, 3, getattr(torch, dtype))
    rule = Dynamic(spec)
    q, s = codes(x, rule.key)
    assert q.dtype == torch.float8_e4m3fn and q.shape == (count, width) and s.shape == (count,)
    assert torch.equal(q.float(), quantize(x, rule.qparams(x, None, None), spec).float())
    assert torch.equal(numbers(q, s, x.dtype), rule.forward(x).view(count, width))


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_weights_are_their_levels(kind: type[Rule], spec: QuantSpec, dtype: torch.dtype) -> None:
    weight, rule = rows(12, 33, 5, dtype), kind(spec)
    scale = kept_scale(rule, weight)
    q, s = codes(weight, rule.key, scale)
    assert torch.equal(numbers(q, s, weight.dtype), rule.forward(weight, scale))


def test_a_quotient_is_not_a_product_with_the_inverse() -> None:
    """Why these codes are not those of ``fp8_rows``."""
    middles = torch.tensor([*range(17, 32, 2), *range(34, 64, 4), *range(68, 128, 8), 448], device=DEVICE)
    x = middles * torch.arange(3.0, 200.0, device=DEVICE)[:, None]  # each row in units of its scale: ties
    found, other = codes(x, Dynamic(INPUTS[0]).key), fp8_rows(x)
    assert torch.equal(found[1], other.scale[:, 0])
    assert 0 < int((found[0].float() != other.codes.float()).sum()) < 0.5 * x.numel()


def test_strides_and_broken_rows() -> None:
    rule, x = Dynamic(INPUTS[0]), rows(24, 16, 1)
    assert same(codes(x.t(), rule.key), codes(x.t().contiguous(), rule.key))
    x[2, 3] = float("nan")
    assert bool(numbers(*codes(x, rule.key), torch.float32)[2].isnan().all())


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", INPUTS[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (5, 48), (3, 1), (3, 4100)], ids=str)
def test_kernel_decides_the_same_codes_of_inputs(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype) -> None:
    from qtrain.kernels import code_rows

    x = rows(*shape, 2, dtype)
    found = code_rows.codes(Dynamic(spec), x, None)
    assert same(found, plain_codes(x, Dynamic(spec)))
    assert torch.equal(code_rows.numbers(*found, dtype), Dynamic(spec).forward(x))
    factor = torch.rand(shape[1], device=x.device) + 0.5
    assert same(code_rows.codes(Dynamic(spec), x, None, factor), plain_codes(x, Dynamic(spec), None, factor))


@KERNELS
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("spec", WEIGHTS[:2], ids=str)
@pytest.mark.parametrize("width", [40, 4100])
def test_kernel_decides_the_same_codes_of_weights(width: int, spec: QuantSpec, kind: type[Rule]) -> None:
    from qtrain.kernels import code_rows

    weight, rule = rows(7, width, 4), kind(spec)
    scale = kept_scale(rule, weight)
    assert same(code_rows.codes(rule, weight, scale), plain_codes(weight, rule, scale))
    strided = weight.t().contiguous().t()
    assert same(code_rows.codes(rule, strided, scale), plain_codes(weight, rule, scale))


@KERNELS
def test_kernel_of_codes_keeps_what_is_no_number() -> None:
    from qtrain.kernels import code_rows

    weight = rows(4, 40, 4)
    weight[2, 3] = torch.nan
    for rule, scale in ((Dynamic(WEIGHTS[1]), None), (Static(WEIGHTS[1]), torch.ones(4, 1, device=DEVICE))):
        if scale is not None:
            weight[3, 1] = torch.inf  # no range of its own reaches it
        found, wanted = code_rows.codes(rule, weight, scale), plain_codes(weight, rule, scale)
        assert bool(found[0][2, 3].isnan())
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.float().nan_to_num(-1.0), other.float().nan_to_num(-1.0))


# ---------------------------------------------------------------- layers


Found = list[Tensor]


def both(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: QuantSpec, inputs: QuantSpec, kind: type[Rule]
) -> tuple[Found, Found]:
    """Output and gradients of x, W and b: of fp8 codes, and simulated."""
    rule, scale = kind(spec), kept_scale(kind(spec), weight)
    torch.manual_seed(1)
    upper = torch.randn(*x.shape[:-1], len(weight), device=x.device, dtype=x.dtype)
    found = []
    for layer in (fp8_linear, quantized_linear):
        leaves: list[Any] = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = layer(*leaves, weight_rule=rule, input_rule=Dynamic(inputs), weight_scale=scale)
        y.backward(upper)
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    return found[0], found[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 18),
    st.integers(1, 40),
    st.sampled_from(WEIGHTS),
    st.sampled_from(INPUTS),
    st.sampled_from(RANGES),
    st.booleans(),
)
def test_a_layer_of_fp8_is_the_simulated_one(
    tokens: int, out: int, width: int, spec: QuantSpec, inputs: QuantSpec, kind: type[Rule], biased: bool
) -> None:
    x, weight = rows(tokens, width, 7).view(1, tokens, width), rows(out, width, 8)
    bias = torch.linspace(-1, 1, out, device=x.device) if biased else None
    found, wanted = both(x, weight, bias, spec, inputs, kind)
    rule, scale = kind(spec), kept_scale(kind(spec), weight)
    levels = Dynamic(inputs).forward(x).double(), rule.forward(weight, scale).double()
    exact = torch.nn.functional.linear(*levels, None if bias is None else bias.double())
    sizes = levels[0].abs() @ levels[1].abs().t() + 1.0
    assert bool(((found[0].double() - exact).abs() <= sizes * (width + 4) * ROUNDING).all())
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(one, other)  # the same levels in the same products


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_in_bf16_gradients_are_bit_for_bit_and_outputs_nearer_the_exact_sum(spec: QuantSpec, kind: type[Rule]) -> None:
    x, weight = rows(64, 96, 7, torch.bfloat16), rows(32, 96, 8)
    bias = torch.linspace(-1, 1, 32, device=x.device)
    found, wanted = both(x, weight, bias, spec, INPUTS[0], kind)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    rule, scale = kind(spec), kept_scale(kind(spec), weight)
    levels = Dynamic(INPUTS[0]).forward(x.float()).double(), rule.forward(weight, scale).double()
    exact = torch.nn.functional.linear(*levels, bias.bfloat16().double())
    assert float((found[0].double() - exact).norm()) < float((wanted[0].double() - exact).norm())
    assert float((found[0].double() - exact).norm()) <= 2.0**-8 * float(exact.norm())


def test_static_ranges_clip_and_inputs_do_not() -> None:
    x, weight = rows(9, 40, 7), rows(8, 40, 8)
    d_x, d_w = both(x, weight, None, WEIGHTS[0], INPUTS[0], Static)[0][1:]
    scale = kept_scale(Static(WEIGHTS[0]), weight)
    assert scale is not None
    outside = (weight / scale.bfloat16().float()).abs() > 448
    assert bool(outside.any()) and bool((d_w[outside] == 0).all()) and bool((d_w[~outside] != 0).any())
    assert bool((d_x != 0).all())


def test_it_saves_a_byte_a_number() -> None:
    x, weight = rows(64, 96, 7).requires_grad_(), rows(32, 96, 8).requires_grad_()
    saved: dict[int, tuple[torch.dtype, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            saved[tensor.data_ptr()] = tensor.dtype, tensor.nbytes
        return tensor

    rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        q = fp8_linear(x, weight, None, **rules)
        k = fp8_linear(x, weight, None, **rules)  # the same bytes, rounded once
    assert sorted(saved.values(), key=str) == [(torch.float32, 64 * 4), (torch.float8_e4m3fn, 64 * 96)]
    (q + k).sum().backward()


def test_autocast_decides_the_dtype_and_rounds_no_sum() -> None:
    x, weight = rows(8, 32, 7).requires_grad_(), rows(16, 32, 8).requires_grad_()
    bias = torch.ones(16, device=x.device, requires_grad=True)
    rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = fp8_linear(x, weight, bias, **rules)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, fp8_linear(x.bfloat16(), weight, bias, **rules))
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_in_blocks_as_layer_by_layer(inputs: QuantSpec) -> None:
    """Layers of one input, and a gated MLP, as one function."""
    key, rule = Dynamic(inputs).key, Dynamic(WEIGHTS[0])
    weights = [rows(out, width, out) for out, width in ((48, 32), (48, 32), (32, 48))]
    x = rows(8, 32, 7)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x, weight, None, weight_rule=rule, input_rule=Dynamic(inputs))

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return layer(torch.nn.functional.silu(layer(x, gate)) * layer(x, up), down)

    def block(x: Tensor, *given: Tensor) -> Tensor:
        linears = [ByteLinear(weight, None, None, rule.key) for weight in given]
        assert all(map(torch.equal, int8_products(x, linears[:2], input_key=key), (layer(x, w) for w in given[:2])))
        return int8_mlp(x, linears, input_key=key, hidden_key=key)

    results = []
    for function in (mlp, block):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and float((one - other).norm()) <= 1e-6 * float(other.norm())


@KERNELS
def test_a_layer_over_the_kernels_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.kernels import code_rows, fake_quantize, quantize_rows

    x, weight = rows(6, 40, 7), rows(16, 40, 8)
    rule, inputs = WEIGHTS[0], INPUTS[0]
    wanted = both(x, weight, None, rule, inputs, Static)[1]
    called: list[str] = []

    def kernel(x: Tensor, scale: Tensor | None, factor: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        called.append("codes")
        return code_rows.codes(rule, x, scale, factor)

    monkeypatch.setattr(codes_module, "_codes", kernel)
    monkeypatch.setattr(quantize_rows, "fits", lambda rule, x: called.append("levels") or True)
    monkeypatch.setattr(fake_quantize, "quantize_rows", quantize_rows)
    found = both(x, weight, None, rule, inputs, Static)[0]
    assert called.count("codes") == 2 and "levels" in called
    assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=16 * ROUNDING * float(wanted[0].abs().max()))
    assert all(map(torch.equal, found[1:], wanted[1:]))


@pytest.mark.parametrize(
    ("weight", "inputs", "reason"),
    [
        (Dynamic(WEIGHTS[0]), Dynamic(INPUTS[0]), None),
        (Static(WEIGHTS[2]), Dynamic(INPUTS[2]), None),
        (Dynamic(WEIGHTS[0]), None, "inputs are not quantized"),
        (None, Dynamic(INPUTS[0]), "weights are not quantized"),
        (Dynamic(fp8("per_group", group_size=32)), Dynamic(INPUTS[0]), "per_group"),
        (Dynamic(WEIGHTS[0]), Static(INPUTS[2]), "dynamic"),
        (Dynamic(WEIGHTS[0]), CompatibleLLMQAT(INPUTS[0]), "dynamic"),
        (Dynamic(WEIGHTS[0]), Dynamic(fp8("per_token", format="fp8_e5m2")), "inputs are fp8_e5m2"),
        (Dynamic(fp8("per_channel", format="int8")), Dynamic(INPUTS[0]), "weights are int8"),
    ],
    ids=str,
)
def test_who_has_a_product_of_fp8(weight: Rule | None, inputs: Rule | None, reason: str | None) -> None:
    found = lacks_fp8_product(weight, inputs, 32, 48)
    assert found is None if reason is None else found is not None and reason in found
    assert lacks_fp8_product(weight, inputs, 32, 40) is not None


@pytest.mark.parametrize("out", [32, 33])
def test_products_are_handed_to_units_or_not(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    own = code_product.fp8_matmul

    def product(*given: Any, fast_sums: bool) -> Tensor:
        seen.append(fast_sums)
        return own(*given, fast_sums=fast_sums)

    monkeypatch.setattr(code_product, "fp8_matmul", product)
    x, weight = codes(rows(7, 48, 1), Dynamic(INPUTS[0]).key), codes(rows(out, 48, 2), Dynamic(WEIGHTS[1]).key)
    found = code_matmul(x[0], weight[0], x[1], weight[1], None, torch.float32)
    exact = (x[0].double() * x[1][:, None]) @ (weight[0].double() * weight[1][:, None]).t()
    assert seen == [False] and float((found - exact).norm()) <= 4 * ROUNDING * float(exact.norm())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace:UserWarning")
def test_it_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    x, weight = rows(8, 24, 7), rows(6, 24, 8)
    rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x, weight, None, **rules).square()

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        one, other = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(one, other)
        y.sum().backward()
        results.append((y.detach(), one.grad, other.grad))
    for eager, compiled in zip(*results, strict=True):
        assert eager is not None and compiled is not None and torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_on_a_gpu_large_layers_run_on_fp8_units(biased: bool, dtype: torch.dtype) -> None:
    x, weight = rows(1000, 4096, 7, dtype), rows(2048, 4096, 8)
    bias = torch.linspace(-1, 1, 2048, device=x.device) if biased else None
    found, wanted = both(x, weight, bias, WEIGHTS[0], INPUTS[0], Dynamic)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(one, other)
    exact = Dynamic(INPUTS[0]).forward(x.float()).double() @ Dynamic(WEIGHTS[0]).forward(weight).double().t()
    exact = exact if bias is None else exact + bias.to(dtype)
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert float((found[0].double() - exact).norm()) <= bound * float(exact.norm())
