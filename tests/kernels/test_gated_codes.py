"""SwiGLU to codes and back: plain against the parts it is made of, in one pass against plain."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.kernels import gated_codes as module
from qtrain.kernels.codes import codes, numbers
from qtrain.kernels.gated_codes import gated_codes, gated_codes_backward
from qtrain.numerics.rules import Dynamic
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPECS = [
    QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"),
    QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="bf16", full_range=True),
    QuantSpec("int4", granularity="per_token", group_size=None, scale_dtype="fp16"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KERNELS = pytest.mark.skipif(
    module.gated_code_tiles is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or the interpreter"
)


def example(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + size)
    device = "cuda" if ON_GPU else "cpu"
    gate, up, upper = (torch.randn(rows, size, generator=generator).to(device, dtype) for _ in range(3))
    gate[0] = 0.0  # a row of nothing
    return 3 * gate, up, upper


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_layers_one_after_the_other(dtype: torch.dtype, spec: QuantSpec) -> None:
    gate, up, upper = example(5, 37, dtype)
    key = Dynamic(spec).key
    g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = F.silu(g) * u
    q, s = codes(h.detach(), key)
    found = gated_codes(gate, up, key)
    assert ON_GPU or (torch.equal(found[0], q) and torch.equal(found[1], s))
    wanted = (numbers(q, s, dtype), *torch.autograd.grad(h, (g, u), upper))
    for one, own in zip(gated_codes_backward(gate, up, upper.clone(), s, key), wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - own.double()).norm() <= TOLERANCES[dtype] * own.double().norm()


@KERNELS
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4096), (2, 9001), (1, 16390)], ids=str)
def test_kernels_are_their_twins(shape: tuple[int, int], spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.gated_code_tiles is not None
    key = Dynamic(spec).key
    for dtype in DTYPES:
        gate, up, upper = example(*shape, dtype)
        q, s = module.gated_code_tiles.forward(spec, gate, up)
        found = q, s, *module.gated_code_tiles.backward(spec, gate, up, upper.clone(), s)
        with monkeypatch.context() as patch:
            patch.setattr(module, "gated_code_tiles", None)
            wanted = *gated_codes(gate, up, key), *gated_codes_backward(gate, up, upper.clone(), s, key)
        # A code may be the next one where two exponentials differ by a bit.
        assert (found[0].int() - wanted[0].int()).abs().max() <= 1
        assert (found[0] != wanted[0]).float().mean() <= 1e-3
        assert torch.allclose(found[1], wanted[1], rtol=1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(found[2], numbers(found[0], found[1], dtype))
        for one, own in zip(found[3:], wanted[3:], strict=True):
            assert (one.double() - own.double()).norm() <= TOLERANCES[dtype] * own.double().norm()


@KERNELS
def test_kernels_mark_broken_rows_and_take_strides() -> None:
    assert module.gated_code_tiles is not None
    gate, up, _ = example(6, 40, torch.float32)
    turned = module.gated_code_tiles.forward(SPECS[0], gate.t(), up.t())
    assert torch.equal(turned[0], module.gated_code_tiles.forward(SPECS[0], gate.t().contiguous(), up.t())[0])
    up[2, 3] = float("nan")
    scales = module.gated_code_tiles.forward(SPECS[0], gate, up)[1]
    assert bool(scales[2].isnan()) and int(scales.isnan().sum()) == 1
