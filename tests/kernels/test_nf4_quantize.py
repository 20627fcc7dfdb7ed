"""NF4 by a table: every byte and figure is bitsandbytes' own, on thresholds, at zero and where numbers are tiny too."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.kernels.nf4_quantize import nf4_quantize
from qtrain.modules.frozen_linear import freeze_linear, frozen_shell, settle
from qtrain.numerics import row_parts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODE = get_4bit_type("nf4", device="cpu")
THRESHOLDS = (CODE[:-1] + CODE[1:]) / 2
INF = torch.tensor(torch.inf)


def assert_same(words: Tensor, state: QuantState, expected_words: Tensor, expected: QuantState) -> None:
    assert torch.equal(words, expected_words)
    found, wanted = state.as_dict(packed=True), expected.as_dict(packed=True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        # as bytes: NaN is itself
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def check(weight: Tensor) -> None:
    for double_quant in (True, False):
        assert_same(
            *nf4_quantize(weight, double_quant=double_quant),
            *quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"),
        )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    blocks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-45, 1e-40, 2e-38, 1e-20, 6e-8, 0.02, 1.0, 3e4, 1e38]),
    kind=st.sampled_from(["normal", "ties", "levels", "with zeros", "with zero blocks"]),
)
def test_any_weight(seed: int, blocks: int, dtype: torch.dtype, scale: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, 64, generator=generator)
    if kind in ("ties", "levels"):
        values = THRESHOLDS if kind == "ties" else CODE
        x = values[torch.randint(len(values), x.shape, generator=generator)]
        # the number itself, or one of its neighbours
        step = torch.randint(3, x.shape, generator=generator)
        x = torch.where(step == 1, torch.nextafter(x, INF), torch.where(step == 2, torch.nextafter(x, -INF), x))
        x[:, 0] = 1.0
    elif kind == "with zeros":
        x[torch.rand(x.shape, generator=generator) < 0.5] = -0.0
    elif kind == "with zero blocks":
        x[torch.rand(blocks, generator=generator) < 0.5] = 0.0
    check(x.mul(scale).to(dtype).nan_to_num())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=64, max_size=64))
def test_any_numbers(numbers: list[float]) -> None:
    check(torch.tensor(numbers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_around_every_threshold(dtype: torch.dtype) -> None:
    steps = torch.arange(-2000, 2001, dtype=torch.int32)
    around = torch.cat([(t.view(torch.int32) + steps).view(torch.float32) for t in [*THRESHOLDS, *CODE]]).to(dtype)
    around = around[around.isfinite()]  # below zero lies NaN
    for largest in (1.0, 0.7, 1.7, 3.1e-3):
        blocks = (around[: len(around) // 63 * 63] * largest).view(-1, 63)
        check(torch.cat([torch.full((len(blocks), 1), largest, dtype=dtype), blocks], dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    check(numbers[numbers.isfinite()][: 2**15 // 64 * 64].view(-1, 64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_as_it_was(bad: float) -> None:
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    weight[1, 5] = bad
    words, state = nf4_quantize(weight, double_quant=False)
    expected, known = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert_same(words, state, expected, known)


@pytest.mark.parametrize("shape", [(3, 43), (1, 64), (5, 64), (64,), (63,), (0, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    if torch.Size(shape).numel():
        check(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    else:
        assert nf4_quantize(torch.empty(shape), double_quant=False)[0].numel() == 0


def test_in_parts_and_of_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    monkeypatch.setattr(row_parts, "PART", 300)
    check(weight)
    check(weight.t())


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_frozen_layer_is_the_one_that_bitsandbytes_would_make(double_quant: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(128, 96).to(torch.bfloat16)
    cpu = torch.device("cpu")
    ours = freeze_linear(linear, "nf4", double_quant=double_quant, compute_dtype=torch.bfloat16, device=cpu)
    shell = frozen_shell(linear, "nf4", double_quant=double_quant, compute_dtype=torch.bfloat16)
    assert isinstance(shell, bnb.nn.Linear4bit)
    shell.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=shell
    )
    own = settle(shell, linear.bias, cpu)
    assert isinstance(ours, bnb.nn.Linear4bit) and isinstance(own, bnb.nn.Linear4bit)
    assert isinstance(ours.weight, bnb.nn.Params4bit) and isinstance(own.weight, bnb.nn.Params4bit)
    assert_same(ours.weight.data, ours.weight.quant_state, own.weight.data, own.weight.quant_state)
    assert {k: type(v) for k, v in vars(ours).items()} == {k: type(v) for k, v in vars(own).items()}
    for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
        assert getattr(ours.weight, key) == getattr(own.weight, key), key
    assert ours.quant_state is ours.weight.quant_state
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(x), own(x))
    saved, wanted = ours.state_dict(), own.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
