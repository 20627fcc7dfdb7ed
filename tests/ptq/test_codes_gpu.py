"""The starting points that decide codes, on a CUDA device: the codes and scales of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import GptqSection, HqqSection, MseSection, RtnSection, SpqrSection
from qtrain.ptq.gptq import Gptq
from qtrain.ptq.hqq import Hqq
from qtrain.ptq.mse import Mse
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.spqr import Spqr
from qtrain.ptq.start import Inputs, Start

pytestmark = pytest.mark.gpu

STARTS: list[Start[Any]] = [
    Rtn(RtnSection()),
    Mse(MseSection()),
    Hqq(HqqSection()),
    Gptq(GptqSection()),
    Gptq(GptqSection(order="given", scales="absmax")),
    Spqr(SpqrSection()),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("start", STARTS, ids=lambda start: type(start).__name__)
def test_both_devices_agree(start: Start[Any], symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(64, 128, generator=generator)
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    hessian = x.T @ x / len(x)
    spec = QuantSpec(format="int4", group_size=32, symmetric=symmetric)
    inputs = [Inputs(moment=h.diagonal(), hessian=h) for h in (hessian, hessian.cuda())]
    here, there = (start.quantize(w, spec, seen) for w, seen in zip((weight, weight.cuda()), inputs, strict=True))
    assert there.codes.is_cuda and there.scale.is_cuda
    # Sums are taken in another order there: near a tie a code differs, and with feedback the rest of its row.
    assert float((there.codes.cpu() == here.codes).float().mean()) > 0.9
    errors = [(record.dequantize().cpu() - weight) for record in (here, there)]
    lost = [float(((error @ hessian) * error).sum()) for error in errors]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)
