"""Rows in fp8 and their products: plain beside float64, Triton beside plain."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels import fp8_product as kernel
from qtrain.kernels.fp8_product import (
    Fp8Rows,
    fp8_matmul,
    fp8_rows,
    fp8_rows_beside,
    plain_fp8_matmul,
    plain_fp8_rows,
)

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
tiles = pytest.mark.skipif(
    kernel.fp8_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)


def numbers(rows: Fp8Rows) -> Tensor:
    return rows.codes.double() * rows.scale.double()


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40)),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_rows_are_within_half_a_step(shape: tuple[int, int], size: float, dtype: torch.dtype, seed: int) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    x[:1] = 0  # a row of zeros
    found = plain_fp8_rows(x)
    assert found.codes.dtype == torch.float8_e4m3fn and found.scale.shape == (shape[0], 1)
    exact, largest = x.double(), x.double().abs().amax(1, keepdim=True)
    # 3 bits of mantissa: half a step is 2^-4 of a number, and no less than 2^-10 / 448 of the row's largest.
    bound = torch.maximum(exact.abs() * 2**-4, largest * 2**-10 / 448 * 1.01) * (1 + 1e-6)
    assert ((numbers(found) - exact).abs() <= bound).all() and not numbers(found)[:1].any()


def test_a_factor_goes_in_before_the_rounding() -> None:
    x, factor = torch.randn(5, 24), torch.rand(24) + 0.1
    found, wanted = plain_fp8_rows(x, factor), plain_fp8_rows(x * factor)
    assert torch.equal(found.codes.float(), wanted.codes.float()) and torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("shape", [(3, 5, 7), (32, 48, 64), (0, 8, 8), (17, 16, 16)])
def test_products_of_these_numbers(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = fp8_rows(torch.randn(m, k, device=DEVICE)), fp8_rows(torch.randn(n, k, device=DEVICE))
    exact = numbers(a) @ numbers(b).t()
    found = fp8_matmul(a, b, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.shape == (m, n)
    assert (found.double() - exact).norm() <= 5e-3 * exact.norm()
    assert (plain_fp8_matmul(a, b, torch.float32).double() - exact).norm() <= 1e-6 * exact.norm()


@tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 24, 300, 5000, 16400])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_tiles_are_the_twin(columns: int, scaled: bool, dtype: torch.dtype) -> None:
    assert kernel.fp8_tiles is not None
    x = torch.randn(columns, 6, device=DEVICE).to(dtype).t()  # not contiguous
    x[2] = 0
    x[3] *= 1e-4
    factor = torch.rand(columns, device=DEVICE) if scaled else None
    codes, scale = kernel.fp8_tiles.fp8_rows(x, factor)
    wanted = plain_fp8_rows(x, factor)
    assert torch.equal(scale, wanted.scale)
    assert torch.equal(codes.float(), wanted.codes.float())


@tiles
@pytest.mark.parametrize("sizes", [[24, 40], [300, 5000, 33], [16400, 1], [64, 64, 64], [4096, 4100]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_are_those_of_all_side_by_side(sizes: list[int], dtype: torch.dtype) -> None:
    assert kernel.fp8_tiles is not None
    xs = [torch.randn(size, 6, device=DEVICE).to(dtype).t() * 10.0**-i for i, size in enumerate(sizes)]
    for x in xs:
        x[2] = 0
    factor = torch.rand(sum(sizes), device=DEVICE)
    wanted = plain_fp8_rows(torch.cat(xs, 1), factor)
    codes, scale = kernel.fp8_tiles.fp8_rows_beside(xs, factor)
    assert torch.equal(scale, wanted.scale) and torch.equal(codes.float(), wanted.codes.float())
    codes, scale = kernel.fp8_tiles.fp8_rows_beside(xs)
    assert torch.equal(codes.float(), plain_fp8_rows(torch.cat(xs, 1)).codes.float())
    for count in (1, 2, 4):  # more than a kernel reads
        many = [xs[0]] * count
        factors = torch.cat([factor[: sizes[0]]] * count)
        found, other = fp8_rows_beside(many, factors), plain_fp8_rows(torch.cat(many, 1), factors)
        assert torch.equal(found.scale, other.scale) and torch.equal(found.codes.float(), other.codes.float())


@tiles
@pytest.mark.parametrize("columns", [40, 20_000])
def test_a_row_with_nan_is_seen_to_be(columns: int) -> None:
    assert kernel.fp8_tiles is not None
    x = torch.randn(3, columns, device=DEVICE)
    x[1, columns // 2] = torch.nan
    beside = Fp8Rows(*kernel.fp8_tiles.fp8_rows_beside([torch.ones_like(x), x]))
    for found in (plain_fp8_rows(x), Fp8Rows(*kernel.fp8_tiles.fp8_rows(x)), beside):
        assert found.scale[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("capability", "known"), [((7, 5), False), ((8, 0), False), ((8, 6), False), ((9, 0), True), ((10, 0), True)]
)
def test_a_gpu_without_fp8_gets_the_plain_twin(
    capability: tuple[int, int], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 8.9 Triton refuses to compile e4m3."""
    monkeypatch.setattr(kernel, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert kernel.has_fp8(torch.device("cuda", 0)) == known and not kernel.has_fp8(torch.device("cpu"))
    assert kernel.fp8_words(torch.device("cuda", 0)).startswith("fp8 tensor cores") == known
    monkeypatch.setattr(torch.version, "cuda", None)  # another maker's
    assert not kernel.has_fp8(torch.device("cuda", 0))


@pytest.mark.parametrize("known", [False, True])
def test_rows_are_the_kernels_only_where_it_compiles(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def tiles(x: Tensor, factor: Tensor | None) -> Fp8Rows:
        called.append("kernel")
        return plain_fp8_rows(x, factor)

    monkeypatch.setattr(kernel, "has_fp8", lambda device: known)
    monkeypatch.setattr(kernel, "fp8_tiles", SimpleNamespace(fp8_rows=tiles))
    x = torch.randn(3, 16)
    assert torch.equal(fp8_rows(x).codes.float(), plain_fp8_rows(x).codes.float()) and called == ["kernel"] * known
    assert fp8_rows(x[:0]).codes.shape == (0, 16) and len(called) == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 32, 48), (5, 32, 40), (0, 32, 48)], ids=str)
def test_what_fp8_units_are_given(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both widths multiples of 16, the second side turned over, scales of rows where sums are rounded to bf16."""
    given: list[dict[str, object]] = []

    def units(a: Tensor, b: Tensor, s: Tensor, t: Tensor, bias: Tensor | None = None, **named: object) -> Tensor:
        given.append({"scales": (tuple(s.shape), tuple(t.shape)), "b": b.stride(), **named})
        total = (a.float() @ b.float()) * s * t
        return (total if bias is None else total + bias).to(dtype)

    monkeypatch.setattr(kernel, "has_fp8", lambda device: True)
    monkeypatch.setattr(kernel, "fp8_tiles", None)
    monkeypatch.setattr(torch, "_scaled_mm", units)
    m, n, k = shape
    a, b, bias = fp8_rows(torch.randn(m, k)), fp8_rows(torch.randn(n, k)), torch.randn(n, dtype=dtype)
    found = fp8_matmul(a, b, dtype, bias, fast_sums=False)
    wanted = plain_fp8_matmul(a, b, dtype, bias)
    assert found.dtype == dtype and torch.allclose(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    scales = ((m, 1), (1, n)) if dtype == torch.bfloat16 else ((), ())
    call = {"scales": scales, "b": (1, k), "out_dtype": dtype, "use_fast_accum": False}
    assert given == ([call] if m and k % 16 == 0 else [])


def test_autocast_rounds_no_sum() -> None:
    a, b = plain_fp8_rows(torch.randn(8, 64)), plain_fp8_rows(torch.randn(8, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plain_fp8_matmul(a, b, torch.float32)
    assert torch.equal(found, plain_fp8_matmul(a, b, torch.float32))


@tiles
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 24, 40), (33, 80, 48)])
def test_the_gradient_of_an_input_over_a_weight_of_four_bits(shape: tuple[int, int, int]) -> None:
    """dL/dx = s (q q_W), q and s of dY s_W^T and q_W turned over, both by kernels; against dY W in float64."""
    pytest.importorskip("triton")
    from bitsandbytes.functional import quantize_4bit

    from qtrain.kernels import nf4_fp8_tiles, nf4_tiles

    assert kernel.fp8_tiles is not None
    tokens, out, columns = shape
    generator = torch.Generator().manual_seed(tokens)
    stored, dy = (torch.randn(size, generator=generator).to(DEVICE) for size in ((out, columns), (tokens, out)))
    words, state = quantize_4bit(stored, compress_statistics=True, quant_type="nf4")
    weight = nf4_tiles.dequantize(words, state, torch.float32)
    wanted = dy.double() @ weight.double()
    scale = fp8_rows(weight).scale
    codes = nf4_fp8_tiles.codes(words, state, scale, torch.float32, turn=True)
    rows = Fp8Rows(*kernel.fp8_tiles.fp8_rows(dy, scale.flatten()))
    found = plain_fp8_matmul(rows, Fp8Rows(codes, scale.new_ones(columns, 1)), torch.float32)
    # Two roundings to 3 bits of mantissa, 2^-4 of a number at most and a third of that as a rule.
    assert 0 < float((found.double() - wanted).norm()) < 0.05 * float(wanted.norm())
