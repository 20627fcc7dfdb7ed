"""4 bits to numbers: bitsandbytes' way, and in one pass with the same bits."""

from __future__ import annotations

import copy
import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor

from qtrain.kernels import nf4_dequantize as kernel
from qtrain.kernels.fp8_product import fp8_rows, plain_fp8_rows

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
tiles = pytest.mark.skipif(
    kernel.nf4_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)


def quantized(shape: tuple[int, int], kind: str, nested: bool, blocksize: int = 64) -> tuple[Tensor, QuantState]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * torch.logspace(-3, 0, shape[1])
    if ON_GPU:
        weight = weight.cuda()
    found: tuple[Tensor, QuantState] = quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    return found


def by_definition(words: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' reference for any device. Its kernel for CPUs takes other blocks where rows are no whole blocks."""
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    code = state.code
    result: Tensor = _dequantize_4bit_compute(
        words.reshape(-1), absmax, code, state.blocksize, tuple(state.shape), torch.float32
    )
    return result.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_plain_twin_is_bitsandbytes_own(kind: str, nested: bool, dtype: torch.dtype) -> None:
    words, state = quantized((24, 128), kind, nested)
    other = copy.copy(state)
    other.dtype = dtype
    found = kernel.dequantize_4bit(words, state, dtype)
    assert torch.equal(found, dequantize_4bit(words, other)) and torch.equal(found, by_definition(words, state, dtype))


@tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 8), (24, 128), (33, 40), (192, 48), (70, 320)], ids=str)
def test_one_pass_gives_the_same_bits(shape: tuple[int, int], kind: str, nested: bool, dtype: torch.dtype) -> None:
    assert kernel.nf4_tiles is not None
    words, state = quantized(shape, kind, nested)
    assert torch.equal(kernel.nf4_tiles.dequantize(words, state, dtype), by_definition(words, state, dtype))
    out = torch.full(shape, 7.0, dtype=dtype, device=words.device)
    assert kernel.nf4_tiles.dequantize(words, state, dtype, out) is out
    assert torch.equal(out, by_definition(words, state, dtype))


@tiles
@pytest.mark.parametrize("shape", [(1, 8), (24, 128), (5, 40)], ids=str)
def test_rows_may_lie_apart(shape: tuple[int, int]) -> None:
    words, state = quantized(shape, "nf4", True)
    whole = torch.full((shape[0], shape[1] + 24), 7.0, dtype=torch.bfloat16, device=words.device)
    assert kernel.nf4_tiles is not None
    kernel.nf4_tiles.dequantize(words, state, torch.bfloat16, whole[:, 8:-16])
    assert torch.equal(whole[:, 8:-16], by_definition(words, state, torch.bfloat16))
    assert bool((whole[:, :8] == 7).all()) and bool((whole[:, -16:] == 7).all())


class Compiled:
    """Stands for a jitted function and for what it was compiled to; notes what it is given."""

    def __init__(self, function: Any, given: list[tuple[Any, ...]], first: bool = True) -> None:
        self.given, self.first = given, first
        self.arg_names, self.__name__ = function.arg_names, "kernel"
        self.params = [SimpleNamespace(is_constexpr=False)] * len(self.arg_names)

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.given.append(args)
            return Compiled(self, self.given, first=False)

        return run


@pytest.mark.skipif(kernel.nf4_tiles is None, reason="needs Triton")
@pytest.mark.parametrize("kind", ["dense", "beside others", "lying", "turned"])
def test_a_weight_is_looked_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it, its scales and what is written lie as they did."""
    from qtrain.kernels import launch as launches

    nf4, fp8 = kernel.nf4_tiles, kernel.nf4_fp8_tiles
    assert nf4 is not None and fp8 is not None
    given: list[tuple[Any, ...]] = []
    for module, name in ((nf4, "_dequantize"), (fp8, "_as_they_lie"), (fp8, "_turned")):
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), given))
    looked: list[int] = []
    look = launches._looked_at
    monkeypatch.setattr(launches, "_looked_at", lambda args: (looked.append(1), look(args))[1])
    for name in ("JITFunction", "CompiledKernel"):
        monkeypatch.setattr(launches, name, Compiled)
    monkeypatch.setattr(launches, "_KNOWN", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nf4, "fits", lambda *_: True)
    monkeypatch.setattr(kernel, "has_fp8", lambda device: True)
    words, state = quantized((24, 128), "nf4", True)
    scale = torch.ones(24, 1)

    def asked() -> Tensor:
        if kind in ("lying", "turned"):
            codes = kernel.nf4_fp8_codes(words, state, scale, torch.bfloat16, kind == "turned")
            assert codes is not None and codes.shape == ((128, 24) if kind == "turned" else (24, 128))
            return codes
        out = torch.empty(24, 160, dtype=torch.bfloat16)[:, 16:144]
        return kernel.nf4_dequantize(words, state, torch.bfloat16, out if kind == "beside others" else out.contiguous())

    def address(arg: Any) -> Any:
        return arg.data_ptr() if isinstance(arg, Tensor) else arg

    held = []  # so that no place is another's
    for count in (2, 0, 0):  # by ``launch``, and to be launched again
        held.append(asked())
        assert sum(looked) == count and address(given[-1][1]) == held[-1].data_ptr()
        looked.clear()
    first, second, third = (list(map(address, args)) for args in given)
    assert first[0] == words.data_ptr() and state.absmax.data_ptr() in first
    assert len({one[1] for one in (first, second, third)}) == 3
    for one in (second, third):
        assert [*one[:1], *one[2 : len(first)]] == [*first[:1], *first[2:]]
    changes = [lambda: setattr(state, "absmax", state.absmax.clone()), lambda: words.set_(words.clone())]
    if kind in ("lying", "turned"):
        changes.append(lambda: scale.set_(scale.clone()))
    for change in changes:
        old = list(map(address, given[-1]))
        change()
        for count in (2, 0):
            held.append(asked())
            assert sum(looked) == count
            looked.clear()
            found = list(map(address, given[-1]))
            assert sum(a != b for a, b in zip(found, old, strict=False)) == 2  # what moved, and what is written
    assert id(state) in nf4._PLANS


@tiles
def test_nothing_is_kept_of_a_weight_that_is_gone() -> None:
    assert kernel.nf4_tiles is not None
    words, state = quantized((24, 128), "nf4", True)
    kernel.nf4_tiles.dequantize(words, state, torch.bfloat16)
    key = id(state)
    assert key in kernel.nf4_tiles._PLANS
    del state
    gc.collect()
    assert key not in kernel.nf4_tiles._PLANS


@pytest.mark.gpu
def test_on_a_gpu_it_is_launched_again_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.kernels import launch as launches

    words, state = quantized((256, 512), "nf4", True)
    wanted = by_definition(words, state, torch.bfloat16)
    codes, scale = plain_fp8_rows(wanted)
    looked: list[int] = []
    look = launches._looked_at
    monkeypatch.setattr(launches, "_looked_at", lambda args: (looked.append(1), look(args))[1])
    held = []
    for _ in range(3):
        looked.clear()
        held += [torch.full_like(wanted, 7.0), torch.full((256, 528), 7.0, device="cuda", dtype=torch.bfloat16)]
        assert torch.equal(kernel.nf4_dequantize(words, state, torch.bfloat16, held[-2]), wanted)
        assert torch.equal(kernel.nf4_dequantize(words, state, torch.bfloat16, held[-1][:, 8:-8]), wanted)
        for turn in (False, True) if kernel.has_fp8(words.device) else ():
            found = kernel.nf4_fp8_codes(words, state, scale, torch.bfloat16, turn)
            assert found is not None and torch.equal(found.float(), codes.float().t() if turn else codes.float())
    assert not looked
    odd = torch.full((256 * 512 + 1,), 7.0, device="cuda", dtype=torch.bfloat16)[1:].view(256, 512)
    assert torch.equal(kernel.nf4_dequantize(words, state, torch.bfloat16, odd), wanted)


@tiles
@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_blocks_of_other_sizes(blocksize: int) -> None:
    assert kernel.nf4_tiles is not None
    words, state = quantized((40, 256), "nf4", True, blocksize)
    found = kernel.nf4_tiles.dequantize(words, state, torch.bfloat16)
    assert torch.equal(found, by_definition(words, state, torch.bfloat16))


@tiles
def test_a_weight_that_no_word_ends_with_is_left_to_bitsandbytes() -> None:
    assert kernel.nf4_tiles is not None
    for shape in ((3, 5), (2, 6), (0, 8)):
        state = QuantState(torch.ones(1), shape=shape, blocksize=64, quant_type="nf4")
        assert not kernel.nf4_tiles.fits(
            torch.zeros((shape[0] * shape[1] + 1) // 2, 1, dtype=torch.uint8), state, DTYPES[0]
        )


@tiles
@pytest.mark.parametrize("turn", [False, True], ids=["as it lies", "turned over"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(1, 8), (24, 128), (33, 40), (70, 320)], ids=str)
def test_straight_to_fp8_as_by_way_of_the_weight(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype, turn: bool
) -> None:
    assert kernel.nf4_fp8_tiles is not None
    words, state = quantized(shape, "nf4", nested)
    codes, scale = plain_fp8_rows(by_definition(words, state, dtype))
    found = kernel.nf4_fp8_tiles.codes(words, state, scale, dtype, turn)
    assert found.is_contiguous() and torch.equal((found.t() if turn else found).float(), codes.float())
    apart = torch.cat([scale, torch.full_like(scale, 7.0)], 1)[:, :1]
    assert apart.stride(0) == 2
    again = kernel.nf4_fp8_tiles.codes(words, state, apart, dtype, turn)
    assert torch.equal(again.float(), found.float())
    beside = found.new_zeros(shape[1], shape[0] + 48)
    if turn:
        place = beside[:, 16:-32]
        assert kernel.nf4_fp8_tiles.codes(words, state, scale, dtype, turn, place) is place
        assert torch.equal(place.float(), found.float())
        assert not beside[:, :16].float().any() and not beside[:, -32:].float().any()


@pytest.mark.parametrize("known", [False, True])
def test_straight_to_fp8_only_where_the_kernel_compiles(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words, state = quantized((24, 128), "nf4", True)
    monkeypatch.setattr(kernel, "has_fp8", lambda device: known)
    monkeypatch.setattr(kernel, "nf4_tiles", SimpleNamespace(fits=lambda *_: True))
    monkeypatch.setattr(kernel, "nf4_fp8_tiles", SimpleNamespace(codes=lambda *_: words, again=lambda *_: None))
    assert (kernel.nf4_fp8_codes(words, state, torch.ones(24, 1), torch.bfloat16) is words) == known


@pytest.mark.gpu
def test_on_a_gpu_large_weights_go_straight_to_fp8() -> None:
    words, state = quantized((11008, 4096), "nf4", True)
    codes, scale = fp8_rows(kernel.dequantize_4bit(words, state, torch.bfloat16))
    for turn in (False, True):
        found = kernel.nf4_fp8_codes(words, state, scale, torch.bfloat16, turn)
        assert found is not None and torch.equal((found.t() if turn else found).float(), codes.float())


@pytest.mark.gpu
def test_on_a_gpu_both_give_the_same_bits_for_large_weights() -> None:
    for kind in ("nf4", "fp4"):
        words, state = quantized((4096, 11008), kind, True)
        for dtype in DTYPES:
            plain = kernel.dequantize_4bit(words, state, dtype)
            out = torch.empty_like(plain)
            assert kernel.nf4_dequantize(words, state, dtype, out) is out and torch.equal(out, plain)


def test_the_choice_says_why() -> None:
    function, words = kernel.choose_dequantize(torch.device("cpu"))
    assert function is kernel.dequantize_4bit and "needs a GPU" in words
