"""Codes of rows where a product and its remainder must not be taken for a quotient, or are hard put to be one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from qtrain.kernels.codes import plain_codes
from qtrain.numerics.rules import Dynamic
from qtrain.numerics.spec import QuantSpec

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
KERNELS = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")
ONES = float(torch.tensor(0x3F7FFFFF, dtype=torch.int32).view(torch.float32))  # 1 - 2^-24, all bits of it set
SPECS = [
    QuantSpec("int8", granularity="per_token", group_size=None, scale_dtype="fp32"),
    QuantSpec("int4", granularity="per_channel", group_size=None, scale_dtype="bf16"),
    QuantSpec("int2", granularity="per_channel", group_size=None, scale_dtype="fp32", mid_rise=True),
]


def rows(spec: QuantSpec) -> Tensor:
    """A row by row: its largest number decides the scale, the others lie where codes meet."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for scale in (1.0, ONES, 0.3, 2.0**-40 * ONES, 2.0**-95, 2.0**-110, 2.0**100, 2.0**119 / 3):
        between = (torch.arange(-127, 128, dtype=torch.float64) + 0.5) * scale
        row = between.clamp(-spec.reach * scale, spec.reach * scale).to(torch.float32)
        nudged = torch.randint(-3, 4, row.shape, generator=generator, dtype=torch.int32)
        row = (row.view(torch.int32) + nudged).view(torch.float32)
        row[0] = spec.reach * scale
        found.append(row.nan_to_num(0.0, 3e38, -3e38))
    for odd in (float("nan"), float("inf"), float("-inf"), 0.0):
        row = torch.randn(255, generator=generator) if odd else torch.zeros(255)
        row[7] = odd
        found.append(row)
    return torch.stack(found).to(DEVICE)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_they_are_those_of_division(spec: QuantSpec, dtype: torch.dtype) -> None:
    from qtrain.kernels import code_rows

    rule, x = Dynamic(spec), rows(spec).to(dtype)
    found, wanted = code_rows.codes(rule, x, None), plain_codes(x, rule)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    told = wanted[1].isfinite()  # what a code of another row is makes no difference: it is multiplied with NaN or inf
    assert torch.equal(found[0][told], wanted[0][told]) and int(told.sum()) >= 8
