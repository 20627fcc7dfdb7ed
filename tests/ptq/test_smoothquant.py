"""SmoothQuant: the paper's scales, the product unchanged, and outliers of the inputs made smaller."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.config import RtnSection, SmoothQuantSection
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.smoothquant import SmoothQuant
from qtrain.ptq.start import Inputs
from qtrain.ptq.walk import quantize_blocks

SPEC = QuantSpec("int8", granularity="per_channel", group_size=None)


@settings(max_examples=30, deadline=None)
@given(
    alpha=st.floats(0, 1),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 24),
    seed=st.integers(0, 99),
)
def test_the_scale_is_the_papers(alpha: float, rows: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, width, generator=generator) * torch.exp(2 * torch.randn(width, generator=generator))
    weights = [torch.randn(n, width, generator=generator) for n in rows]
    scale = SmoothQuant(SmoothQuantSection(alpha=alpha)).scale(
        [(weight, SPEC) for weight in weights], Inputs(largest=x.abs().amax(0)), torch.arange(width)
    )
    expected = x.abs().amax(0) ** alpha / torch.cat(weights).abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(scale, expected)
    s, exact = scale.double(), [x.double() @ weight.double().T for weight in weights]
    for weight, product in zip(weights, exact, strict=True):
        torch.testing.assert_close((x.double() / s) @ (weight.double() * s).T, product, rtol=0, atol=1e-10)


def test_zeros_are_left_alone() -> None:
    largest, weight = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, -4.0]])
    scale = SmoothQuant(SmoothQuantSection()).scale([(weight, SPEC)], Inputs(largest=largest), torch.arange(3))
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, (3 / 4) ** 0.5]))


def test_query_heads_of_one_kv_head_share_a_scale() -> None:
    largest, weight = torch.tensor([1.0, 2.0, 8.0, 4.0]), torch.tensor([[1.0, 3.0, 0.5, 0.25]])
    channel = torch.tensor([0, 1, 0, 1])
    scale = SmoothQuant(SmoothQuantSection()).scale([(weight, SPEC)], Inputs(largest=largest), channel)
    torch.testing.assert_close(scale, torch.tensor([8.0, 4 / 3]).sqrt())


def largest_inputs(model: LlamaForCausalLM, text: list[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                top = args[0].abs().flatten(0, -2).amax(0)
                found[name] = torch.maximum(found.get(name, top), top)

            handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in text:
            model.eval()(ids)
    for handle in handles:
        handle.remove()
    return found


def linears(model: nn.Module) -> dict[str, QuantSpec]:
    return {n: SPEC for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def test_outlier_channels_shrink_and_the_function_stays(tiny_llama: LlamaForCausalLM) -> None:
    # Norms without transformers' rounding to fp32.
    for name in [name for name, _ in tiny_llama.named_modules() if name.endswith("norm")]:
        norm = nn.RMSNorm(64, eps=1e-6)
        norm.weight.data[5] = 40.0
        tiny_llama.set_submodule(name, norm)
    model = tiny_llama.double()
    text = [torch.randint(4, 500, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 30)]
    before, tops = model.eval()(text[1]).logits, largest_inputs(model, text)
    placed: list[str] = []
    quantize_blocks(
        model,
        linears(model),
        SmoothQuant(SmoothQuantSection(alpha=0.9)),
        text,
        place=lambda name, linear, record: placed.append(name),
    )
    after = largest_inputs(model, text)
    assert len(placed) == 14
    for name in placed:
        if "q_proj" in name or "up_proj" in name:
            assert tops[name].argmax() == 5
            assert after[name][5] < tops[name][5] / 8
            spread = [float(top.max() / top.median()) for top in (tops[name], after[name])]
            assert spread[1] < spread[0] / 4
    torch.testing.assert_close(model(text[1]).logits, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_nearest_afterwards(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = nn.Module.to(tiny_llama, dtype)
    records: dict[str, LinearRecord] = {}
    quantize_blocks(
        model,
        linears(model),
        SmoothQuant(SmoothQuantSection()),
        [torch.arange(4, 44).reshape(2, 20)],
        place=lambda name, linear, record: records.update({name: record}),
    )
    for name, record in records.items():
        expected = Rtn(RtnSection()).quantize(model.get_parameter(f"{name}.weight"), SPEC, Inputs())
        assert torch.equal(record.codes, expected.codes) and torch.equal(record.scale, expected.scale)
