"""What a kernel was compiled for is found again for arguments of the same kind, and for no others."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from qtrain.kernels import launch as module
from qtrain.kernels.launch import Prepared, launch

GRID = (3,)


class Compiled:
    """Stands for what Triton compiled; notes what it is launched with."""

    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launched.append((grid, args))


class Kernel:
    """Stands for a jitted function of (x_ptr, size, BLOCK, LAST); each usual launch of it is a compilation."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "size", "BLOCK", "LAST")
    params = tuple(SimpleNamespace(is_constexpr=name.isupper()) for name in arg_names)

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append((grid, args, constants))
            return Compiled(self.launched)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(module, "JITFunction", Kernel)
    monkeypatch.setattr(module, "CompiledKernel", Compiled)
    monkeypatch.setattr(module, "_KNOWN", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield Kernel()


def aligned(offset: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.zeros(64, dtype=dtype)
    assert x.data_ptr() % 16 == 0
    return x[offset:]


def test_the_second_launch_of_a_kind_is_a_look_up(kernel: Kernel) -> None:
    first, second = aligned(), aligned()
    launch(kernel, GRID, first, 48, LAST=2, BLOCK=64, num_warps=4)
    launch(kernel, (5, 2), second, 96, LAST=2, BLOCK=64, num_warps=4)
    assert [(grid, constants) for grid, _, constants in kernel.compiled] == [
        (GRID, {"LAST": 2, "BLOCK": 64, "num_warps": 4})
    ]
    ((grid, (x, *rest)),) = kernel.launched
    # Grids of three numbers, addresses, and the constants in the kernel's own order behind the rest.
    assert grid == (5, 2, 1) and x == second.data_ptr() and rest == [96, 64, 2]


@pytest.mark.parametrize(
    ("x", "size", "constants"),
    [
        (aligned(1), 48, {}),  # an address that 16 does not divide
        (aligned(dtype=torch.int32), 48, {}),
        (aligned(), 49, {}),
        (aligned(), 1, {}),
        (aligned(), 2**40, {}),
        (aligned(), 2**63 + 16, {}),
        (aligned(), 48.0, {}),
        (aligned(), None, {}),
        (aligned(), 48, {"BLOCK": 128}),
        (aligned(), 48, {"num_warps": 8}),
    ],
    ids=str,
)
def test_other_kinds_are_compiled_by_themselves(
    kernel: Kernel, x: torch.Tensor, size: Any, constants: dict[str, int]
) -> None:
    usual = {"BLOCK": 64, "LAST": 2, "num_warps": 4}
    launch(kernel, GRID, aligned(), 48, **usual)
    launch(kernel, GRID, x, size, **usual | constants)
    assert len(kernel.compiled) == 2 and not kernel.launched
    launch(kernel, GRID, x, size, **usual | constants)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1


def test_each_device_and_each_kernel_has_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Kernel()
    for one in (kernel, other):
        launch(one, GRID, aligned(), 48, BLOCK=64, LAST=2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernel, GRID, aligned(), 48, BLOCK=64, LAST=2)
    assert (len(kernel.compiled), len(other.compiled)) == (2, 1)


def test_numbers_that_are_compiled_in_are_named(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="BLOCK of kernel is compiled in"):
        launch(kernel, GRID, aligned(), 48, 64, LAST=2)


def test_defaults_are_left_to_triton(kernel: Kernel) -> None:
    for _ in range(2):
        launch(kernel, GRID, aligned(), 48, BLOCK=64)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_other_makers_gpus_are_left_to_triton(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        launch(kernel, GRID, aligned(), 48, BLOCK=64, LAST=2)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_a_prepared_launch_is_made_with_another_tensor(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is what it launches, on that device, and on multiples of 16 bytes."""
    first, second = aligned(), aligned()
    prepared = Prepared(kernel, (5, 2), (first, 48), 0, LAST=2, BLOCK=64)
    assert not prepared(second) and not kernel.launched
    launch(kernel, GRID, first, 48, LAST=2, BLOCK=64)
    assert prepared(second) and prepared(first) and not prepared(aligned(1))
    assert kernel.launched == [((5, 2, 1), (one.data_ptr(), 48, 64, 2)) for one in (second, first)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not prepared(second)
    assert not Prepared(kernel, GRID, (aligned(1), 48), 0, LAST=2, BLOCK=64)(second)
    assert not Prepared(lambda: None, GRID, (first, 48), 0, LAST=2, BLOCK=64)(second)
    assert len(kernel.launched) == 2


def test_a_tensor_elsewhere_is_tritons_to_refuse(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(kernel, GRID, aligned(), 48, LAST=2, BLOCK=64)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)
    launch(kernel, GRID, aligned(), 48, LAST=2, BLOCK=64)
    assert len(kernel.compiled) == 2 and not kernel.launched


@pytest.mark.gpu
def test_kernels_are_found_again_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's version hands back: were it not known again, launches would be slow and nothing else."""
    from qtrain.kernels.code_rows import turned
    from qtrain.kernels.int8_matmul import int8_matmul, plain_int8_matmul

    monkeypatch.setattr(module, "_KNOWN", {})
    numbers = torch.randint(-128, 128, (256 * 512 + 1,), dtype=torch.int8, device="cuda")
    kinds = numbers[:-1].view(256, 512), numbers[1:].view(256, 512), numbers[: 255 * 511].view(255, 511)
    for known, q in enumerate(kinds, 1):
        for _ in range(3):
            assert torch.equal(turned(q), q.t().contiguous())
        assert len(module._KNOWN) == known
    a, scale = kinds[0], torch.rand(256, device="cuda")
    for _ in range(3):
        wanted = plain_int8_matmul(a, a, scale, scale, None, torch.bfloat16)
        assert torch.equal(int8_matmul(a, a, scale, scale, None, torch.bfloat16), wanted)
    assert len(module._KNOWN) == len(kinds) + 1
