"""The walk over the blocks, against the same computation by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import RtnSection
from qtrain.ptq.gptq import gptq_codes
from qtrain.ptq.start import Inputs, Start, Statistic
from qtrain.ptq.walk import quantize_blocks

SPEC = QuantSpec("int3", group_size=32)
GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Rounding(Start[RtnSection]):
    """Round to nearest; keeps what it was given."""

    def __init__(self, statistic: Statistic = "none") -> None:
        super().__init__(RtnSection())
        self.statistic = statistic  # type: ignore[misc]
        self.seen: list[Inputs] = []

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        self.seen.append(inputs)
        qparams = choose_qparams(weight, spec)
        return LinearRecord(quantize(weight, qparams, spec), *qparams, spec)


class Feedback(Start[RtnSection]):
    """GPTQ on the extremes' scales."""

    statistic: ClassVar[Statistic] = "hessian"

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        assert inputs.hessian is not None
        qparams = choose_qparams(weight, spec)
        return LinearRecord(gptq_codes(weight, qparams, inputs.hessian, spec), *qparams, spec)


def rewrite(name: str, linear: nn.Linear, record: LinearRecord) -> None:
    linear.weight.data.copy_(record.dequantize(linear.weight.dtype))


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 500, (2, length), generator=generator) for length in lengths]


def linears(model: nn.Module, *, head: bool = False) -> dict[str, QuantSpec]:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: SPEC for name in found if head or name != "lm_head"}


def observed(model: PreTrainedModel, name: str, text: Sequence[Tensor]) -> Tensor:
    """All tokens' inputs [tokens, in] of a layer, from whole forward passes."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: kept.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        for ids in text:
            model.eval()(ids)
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_walk_is_the_whole_model_run_anew_for_each_group(tiny_llama: LlamaForCausalLM, sequential: bool) -> None:
    text, start = rows(5, 17, 5), Feedback(RtnSection())
    by_hand = LlamaForCausalLM(tiny_llama.config)
    by_hand.load_state_dict(tiny_llama.state_dict())
    names = list(linears(by_hand))
    for k in range(2):
        found = [[n for n in names if n.startswith(f"model.layers.{k}.") and n.endswith(tuple(own))] for own in GROUPS]
        for group in found if sequential else [sum(found, [])]:
            inputs = {name: observed(by_hand, name, text) for name in group}
            for name, x in inputs.items():
                layer = by_hand.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                hessian = (x.T @ x / len(x)).float()
                rewrite(name, layer, start.quantize(layer.weight.detach(), SPEC, Inputs(hessian=hessian)))
    losses = quantize_blocks(tiny_llama, linears(tiny_llama), start, text, place=rewrite, sequential=sequential)
    assert {loss.name for loss in losses} == set(names)
    assert [loss.name for loss in losses][:3] == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    # Rounding may fall the other way on one weight of a tie; the outputs are those of the same codes.
    same = [
        torch.isclose(a, b).float().mean() for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True)
    ]
    assert min(same) > 0.999
