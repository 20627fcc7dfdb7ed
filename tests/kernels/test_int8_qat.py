"""Layers that multiply bytes beside the simulated ones, float64 and Triton's interpreter (compiled on a GPU)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels.codes import codes, numbers, plain_codes
from qtrain.kernels.int8_linear import int8_linear, lacks_int8_product
from qtrain.kernels.int8_matmul import int8_matmul, integer_product, plain_int8_matmul
from qtrain.kernels.quantized_linear import quantized_linear
from qtrain.numerics.affine import quantize
from qtrain.numerics.rules import Dynamic, Learned, Rule, Static
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")


def by_token(**changes: Any) -> QuantSpec:
    return QuantSpec(
        **{"format": "int8", "granularity": "per_token", "group_size": None, "scale_dtype": "fp32"} | changes
    )


def by_row(**changes: Any) -> QuantSpec:
    return QuantSpec(
        **{"format": "int4", "granularity": "per_channel", "group_size": None, "scale_dtype": "bf16"} | changes
    )


INPUTS = [
    by_token(),
    by_token(full_range=True),
    by_token(convention="compressed-tensors"),
    by_token(convention="compressed-tensors", scale_dtype="bf16"),
    by_token(format="int4", scale_dtype="fp16"),
]
WEIGHTS = [
    by_row(),
    by_row(format="int8"),
    by_row(full_range=True, scale_dtype="fp16"),
    by_row(format="int2", mid_rise=True),
    by_row(format="int3", scale_dtype="fp32"),
]
RANGES: list[type[Rule]] = [Dynamic, Learned, Static]


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-3, 1, width)
    x[:1] = 0.0
    if count > 1 and width > 1:  # ties: 2.5, -1.5 and .5 of a scale of exactly 1
        x[1] = torch.arange(width) % 7 - 3.5
        x[1, 0] = 127.0
    return x.to(DEVICE, dtype)


def kept_scale(rule: Rule, weight: Tensor) -> Tensor | None:
    if isinstance(rule, Dynamic):
        return None
    return (Dynamic(rule.spec).qparams(weight, None, None).scale.float() * 0.7).clone()


# ---------------------------------------------------------------- codes


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 70), st.sampled_from(INPUTS), st.sampled_from(["float32", "bfloat16", "float16"])
)
def test_codes_are_the_simulated_quantizers(count: int, width: int, spec: QuantSpec, dtype: str) -> None:
    x = rows(count, width, 3, getattr(torch, dtype))
    rule = Dynamic(spec)
    q, s = codes(x, rule.key)
    assert q.dtype == torch.int8 and q.shape == (count, width) and s.shape == (count,)
    assert torch.equal(q, quantize(x, rule.qparams(x, None, None), spec))
    assert torch.equal(numbers(q, s, x.dtype), rule.forward(x).view(count, width))


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("spec", [*WEIGHTS, by_row(format="int7", mid_rise=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_weights_are_their_levels(kind: type[Rule], spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = rows(12, 33, 5, dtype)
    rule = kind(spec)
    scale = kept_scale(rule, weight)
    q, s = codes(weight, rule.key, scale)
    assert torch.equal(numbers(q, s, weight.dtype), rule.forward(weight, scale))


def test_strides_and_broken_rows() -> None:
    rule = Dynamic(INPUTS[0])
    x = rows(24, 16, 1)
    assert torch.equal(codes(x.t(), rule.key)[0], codes(x.t().contiguous(), rule.key)[0])
    x[2, 3] = float("nan")
    assert bool(numbers(*codes(x, rule.key), torch.float32)[2].isnan().all())


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", INPUTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (5, 48), (3, 1), (3, 4100)], ids=str)
def test_kernel_decides_the_same_codes_of_inputs(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype) -> None:
    from qtrain.kernels import code_rows

    x = rows(*shape, 2, dtype)
    found, wanted = code_rows.codes(Dynamic(spec), x, None), plain_codes(x, Dynamic(spec))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    factor = torch.rand(shape[1], device=x.device) + 0.5
    found, wanted = code_rows.codes(Dynamic(spec), x, None, factor), plain_codes(x, Dynamic(spec), None, factor)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@KERNELS
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
@pytest.mark.parametrize("width", [40, 4100])
def test_kernel_decides_the_same_codes_of_weights(width: int, spec: QuantSpec, kind: type[Rule]) -> None:
    from qtrain.kernels import code_rows

    weight = rows(7, width, 4)
    scale = kept_scale(kind(spec), weight)
    found, wanted = code_rows.codes(kind(spec), weight, scale), plain_codes(weight, kind(spec), scale)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@KERNELS
def test_kernel_of_codes_takes_strides_and_marks_broken_rows() -> None:
    from qtrain.kernels import code_rows

    rule, x = Dynamic(INPUTS[0]), rows(24, 16, 1)
    assert torch.equal(code_rows.codes(rule, x.t(), None)[0], plain_codes(x.t(), rule)[0])
    x[2, 3] = float("nan")
    scales = code_rows.codes(rule, x, None)[1]
    assert bool(scales[2].isnan()) and int(scales.isnan().sum()) == 1


@KERNELS
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 130), (64, 64), (2, 4100)], ids=str)
def test_kernels_of_numbers_and_of_turned_codes_are_their_twins(shape: tuple[int, int]) -> None:
    from qtrain.kernels import code_rows

    q, _, s, *_ = operands(shape[0], 1, shape[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(code_rows.numbers(q, s, dtype), (q * s.unsqueeze(1)).to(dtype))
    assert torch.equal(code_rows.turned(q), q.t()) and code_rows.turned(q).is_contiguous()
    assert torch.equal(code_rows.turned(q.t()), q)


# ---------------------------------------------------------------- products


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.rand(size, generator=generator) + 0.1 for size in (m, n, n))
    found = [tensor.to(DEVICE) for tensor in (a, b, *scales)]
    return found[0], found[1], found[2], found[3], found[4]


def reference(a: Tensor, b: Tensor, s: Tensor, t: Tensor | None, bias: Tensor | None) -> Tensor:
    y = (a.double() @ b.double().t()) * s.double().unsqueeze(1)
    y = y if t is None else y * t.double()
    return y if bias is None else y + bias.double()


def check_product(product: Any, m: int, n: int, k: int, **changes: Any) -> None:
    a, b, s, t, bias = operands(m, n, k)
    for scale, shift in ((t, bias), (t, None), (None, None)):
        wanted = reference(a, b, s, scale, shift)
        for dtype, bits in ((torch.float32, 22), (torch.bfloat16, 8), (torch.float16, 11)):
            if dtype == torch.float16 and wanted.numel() and float(wanted.abs().max()) > 65000:
                continue
            found = product(a, b, s, scale, shift, dtype, **changes)
            assert found.dtype == dtype and found.shape == (m, n)
            size = wanted.abs() + (0.0 if shift is None else 2 * shift.abs())
            assert bool(((found.double() - wanted).abs() <= size * 2.0**-bits).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 90))
def test_products_are_exact_but_for_the_scales(m: int, n: int, k: int) -> None:
    check_product(int8_matmul, m, n, k)
    a, b = operands(m, n, k)[:2]
    assert torch.equal(integer_product(a, b).double(), a.double() @ b.double().t())
    assert torch.equal(integer_product(a, b.t().contiguous().t()), integer_product(a, b))


def test_the_largest_codes_do_not_saturate() -> None:
    codes = torch.full((24, 512), -128, dtype=torch.int8, device=DEVICE)
    assert bool((integer_product(codes, codes) == 512 * 128 * 128).all())


@KERNELS
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 65, 70), (130, 20, 64), (257, 300, 128)], ids=str)
def test_kernel_of_products_is_its_twin(size: tuple[int, int, int]) -> None:
    from qtrain.kernels import int8_tiles

    for tiles in int8_tiles.CONFIGS if size[0] < 100 or ON_GPU else int8_tiles.CONFIGS[1:3]:
        check_product(int8_tiles.int8_matmul, *size, tiles=tiles)


@KERNELS
def test_kernel_of_products_takes_strides() -> None:
    from qtrain.kernels import int8_tiles

    a, b, s, t, bias = operands(40, 50, 70)
    wanted = plain_int8_matmul(a, b, s, t, bias, torch.float32)
    for one, other in ((a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        assert torch.allclose(int8_tiles.int8_matmul(one, other, s, t, bias, torch.float32), wanted, rtol=1e-6)
    # Every second number of what is twice as long, other numbers between.
    s, t, bias = (torch.stack([one, torch.full_like(one, 7.0)], 1).flatten()[::2] for one in (s, t, bias))
    assert s.stride() == (2,)
    assert torch.allclose(int8_tiles.int8_matmul(a, b, s, t, bias, torch.float32), wanted, rtol=1e-6)


# ---------------------------------------------------------------- layers


def both(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: QuantSpec, inputs: QuantSpec, kind: type[Rule], **changes: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of x, W, b and the scale: of bytes, and simulated."""
    rule, scale = kind(spec), kept_scale(kind(spec), weight)
    torch.manual_seed(1)
    upper = torch.randn(*x.shape[:-1], len(weight), device=x.device, dtype=x.dtype)
    found = []
    layers: list[Any] = [int8_linear, quantized_linear]
    for layer, options in zip(layers, (changes, {}), strict=True):
        leaves: list[Any] = [
            None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, scale)
        ]
        y = layer(*leaves[:3], weight_rule=rule, input_rule=Dynamic(inputs), weight_scale=leaves[3], **options)
        y.backward(upper)
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)])
    assert len(found[0]) == len(found[1])
    return found[0], found[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from(WEIGHTS),
    st.sampled_from(INPUTS),
    st.sampled_from(RANGES),
    st.booleans(),
)
def test_a_layer_of_bytes_is_the_simulated_one(
    tokens: int, out: int, width: int, spec: QuantSpec, inputs: QuantSpec, kind: type[Rule], biased: bool
) -> None:
    x, weight = rows(tokens, width, 7).view(1, tokens, width), rows(out, width, 8)
    bias = torch.linspace(-1, 1, out, device=x.device) if biased else None
    found, wanted = both(x, weight, bias, spec, inputs, kind)
    rule, scale = kind(spec), kept_scale(kind(spec), weight)
    exact = torch.nn.functional.linear(
        Dynamic(inputs).forward(x).double(),
        rule.forward(weight, scale).double(),
        None if bias is None else bias.double(),
    )
    sizes = Dynamic(inputs).forward(x).double().abs() @ rule.forward(weight, scale).double().abs().t() + 1.0
    # One rounding of the integer, two products, a sum: nothing that grows with the width.
    assert bool(((found[0].double() - exact).abs() <= sizes * 2.0**-21).all())
    assert bool(((found[0] - wanted[0]).abs() <= sizes * width * 2.0**-23).all())
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(one, other)  # the same levels in the same products


@pytest.mark.parametrize("kind", RANGES)
def test_in_bf16_gradients_are_bit_for_bit_and_outputs_nearer_the_exact_sum(kind: type[Rule]) -> None:
    x, weight = rows(64, 96, 7, torch.bfloat16), rows(32, 96, 8)
    found, wanted = both(x, weight, None, WEIGHTS[0], INPUTS[0], kind)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    rule, scale = kind(WEIGHTS[0]), kept_scale(kind(WEIGHTS[0]), weight)
    exact = Dynamic(INPUTS[0]).forward(x.float()).double() @ rule.forward(weight, scale).double().t()
    assert float((found[0].double() - exact).norm()) < float((wanted[0].double() - exact).norm())


def test_learned_ranges_clip_and_inputs_do_not() -> None:
    x, weight = rows(9, 40, 7), rows(8, 40, 8)
    y, d_x, d_w, d_scale = both(x, weight, None, WEIGHTS[0], INPUTS[2], Learned)[0]
    scale = kept_scale(Learned(WEIGHTS[0]), weight)
    assert scale is not None
    torch.manual_seed(1)
    d_y = torch.randn(y.shape, device=y.device, dtype=y.dtype)  # as ``both`` draws it
    levels = Learned(WEIGHTS[0]).forward(weight, scale)
    # Eight products and their sum, in whatever order.
    assert bool(((d_x - d_y.double() @ levels.double()).abs() <= 8 * 2.0**-24 * (d_y.abs() @ levels.abs())).all())
    outside = (weight / scale).abs() > 7
    assert bool(outside.any()) and bool((d_w[outside] == 0).all()) and bool((d_w[~outside] != 0).any())
    assert d_scale.shape == (8, 1)


def test_it_saves_a_byte_a_number() -> None:
    x, weight = rows(64, 96, 7).requires_grad_(), rows(32, 96, 8).requires_grad_()
    saved: dict[int, tuple[torch.dtype, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            saved[tensor.data_ptr()] = tensor.dtype, tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}
        q = int8_linear(x, weight, None, **rules)
        k = int8_linear(x, weight, None, **rules)  # the same bytes
    assert sum(size for _, size in saved.values()) == 64 * 96 + 64 * 4
    (q + k).sum().backward()


def test_one_input_of_several_layers_becomes_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.kernels import int8_linear as module

    made: list[tuple[int, ...]] = []

    def counted(x: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        made.append(tuple(x.shape))
        return codes(x, *rest, **named)

    monkeypatch.setattr(module, "codes", counted)
    x, weight = rows(5, 24, 7).requires_grad_(), rows(6, 24, 8)
    rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}
    first = [int8_linear(x, weight, None, **rules) for _ in range(2)]
    assert made.count((5, 24)) == 1 and torch.equal(first[0], first[1])
    with torch.no_grad():
        x.mul_(3.0)  # another content in the same place
    assert torch.allclose(int8_linear(x, weight, None, **rules), 3 * first[0], rtol=1e-5)
    assert made.count((5, 24)) == 2


def test_a_gradient_of_bytes_errs_by_its_rounding() -> None:
    x, weight = rows(64, 96, 7), rows(48, 96, 8)
    found, wanted = both(x, weight, None, WEIGHTS[0], INPUTS[0], Dynamic, byte_gradient=True)
    assert torch.equal(found[2], wanted[2])  # that of W is not of bytes
    error = float((found[1] - wanted[1]).norm() / wanted[1].norm())
    assert 0 < error < 0.02


def test_autocast_decides_the_dtype() -> None:
    x, weight = rows(8, 24, 7).requires_grad_(), rows(6, 24, 8).requires_grad_()
    bias = torch.ones(6, device=x.device, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = int8_linear(x, weight, bias, weight_rule=Dynamic(WEIGHTS[1]), input_rule=Dynamic(INPUTS[0]))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "inputs", "reason"),
    [
        (Dynamic(by_row()), Dynamic(by_token()), None),
        (Learned(by_row(format="int2", mid_rise=True)), Dynamic(by_token()), None),
        (Dynamic(by_row()), None, "inputs are not quantized"),
        (None, Dynamic(by_token()), "weights are not quantized"),
        (Dynamic(QuantSpec()), Dynamic(by_token()), "per_group"),
        (Dynamic(by_row(symmetric=False)), Dynamic(by_token()), "symmetric"),
        (Dynamic(by_row()), Dynamic(by_token(symmetric=False)), "symmetric"),
        (Dynamic(by_row()), Static(by_token(granularity="per_tensor")), "dynamic by token"),
        (Dynamic(by_row(format="int8", mid_rise=True)), Dynamic(by_token()), "8 bits"),
        (Dynamic(by_row(format="fp8_e4m3")), Dynamic(by_token()), "integers"),
    ],
    ids=str,
)
def test_who_has_a_product_of_bytes(weight: Rule | None, inputs: Rule | None, reason: str | None) -> None:
    found = lacks_int8_product(weight, inputs)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace:UserWarning")
def test_it_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    x, weight = rows(8, 24, 7), rows(6, 24, 8)

    rules: Any = {"weight_rule": Dynamic(WEIGHTS[0]), "input_rule": Dynamic(INPUTS[0])}

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return int8_linear(x, weight, None, **rules).square()

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        one, other = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(one, other)
        y.sum().backward()
        results.append((y.detach(), one.grad, other.grad))
    for eager, compiled in zip(*results, strict=True):
        assert eager is not None and compiled is not None and torch.equal(eager, compiled)
