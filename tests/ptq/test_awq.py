"""AWQ: never worse than rounding to nearest in the loss it minimises, and better where channels differ."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtrain.modules.record import LinearRecord
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.awq import SAMPLE, Awq, row_errors
from qtrain.ptq.config import AwqSection, RtnSection
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.start import Inputs
from qtrain.ptq.walk import LayerLoss, quantize_blocks


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def observed(x: Tensor) -> Inputs:
    return Inputs(x.square().mean(0), x.abs().amax(0), x.abs().mean(0), x.T @ x / len(x))


def unequal_inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated features, a few of which carry large numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) + torch.randn(tokens, 1, generator=generator)
    return x * torch.exp(1.5 * torch.randn(width, generator=generator))


def rtn_loss(weight: Tensor, spec: QuantSpec, hessian: Tensor) -> float:
    record = Rtn(RtnSection()).quantize(weight, spec, Inputs())
    return float(row_errors(record.dequantize() - weight.float(), hessian).sum())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    heads=st.sampled_from([1, 2]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_no_group_of_layers_loses_more_than_by_rounding(
    rows: list[int], groups: int, heads: int, bits: int, symmetric: bool, clip: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    spec = QuantSpec(f"int{bits}", symmetric=symmetric, group_size=16)
    x = unequal_inputs(50, 16 * groups, seed)
    channel = torch.arange(len(x[0])) // heads
    start, inputs = Awq(AwqSection(clip=clip, grid=6)), observed(x)
    weights = [(torch.randn(n, len(channel)).to(dtype), spec) for n in rows]
    scale = start.scale(weights, inputs, channel)
    assert scale.shape == (len(channel) // heads,) and bool((scale > 0).all())
    balanced = sum(start.loss(weight, spec, inputs, scale[channel]) for weight, _ in weights)
    assert inputs.hessian is not None
    assert balanced <= sum(rtn_loss(weight, spec, inputs.hessian) for weight, _ in weights) * (1 + 1e-5)


def test_the_loss_is_the_squared_error_of_the_outputs() -> None:
    x, weight, spec = unequal_inputs(64, 32), torch.randn(8, 32), QuantSpec("int3", group_size=16)
    start, scale = Awq(AwqSection(clip=False)), torch.exp(torch.randn(32))
    record = start.quantize(weight * scale, spec, Inputs())
    direct = ((x / scale) @ record.dequantize().T - x @ weight.T).square().sum() / len(x)
    assert start.loss(weight, spec, observed(x), scale) == pytest.approx(float(direct), rel=1e-4)


def test_the_exponent_is_the_best_of_the_grid() -> None:
    x, spec = torch.randn(64, 64) * torch.exp(torch.linspace(-2, 2, 64)), QuantSpec("int3", group_size=32)
    weights = [(torch.randn(n, 64), spec) for n in (24, 8)]
    start, inputs = Awq(AwqSection(grid=5)), observed(x)
    found = start.scale(weights, inputs, torch.arange(64))
    losses, candidates = [], []
    for exponent in (0, 0.25, 0.5, 0.75, 1):
        scale = x.abs().mean(0) ** exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        losses.append(sum(start.loss(weight, spec, inputs, scale) for weight, _ in weights))
        candidates.append(scale)
    best = losses.index(min(losses))
    assert best > 0
    torch.testing.assert_close(found, candidates[best])


def test_a_sample_of_the_rows_never_makes_all_of_them_worse() -> None:
    spec = QuantSpec("int3", group_size=32)
    weight = torch.randn(2 * SAMPLE, 32)
    weight[1::2] *= torch.exp(3 * torch.randn(32))  # rows that the sample skips
    x = unequal_inputs(64, 32)
    start, inputs = Awq(AwqSection()), observed(x)
    scale = start.scale([(weight, spec)], inputs, torch.arange(32))
    assert start.loss(weight, spec, inputs, scale) <= start.loss(weight, spec, inputs, torch.ones(32))


def test_silent_channels_stay_finite() -> None:
    x = unequal_inputs(64, 32)
    x[:, 3:9] = 0
    start, spec = Awq(AwqSection()), QuantSpec("int3", group_size=16)
    for silent in (x, torch.zeros(4, 32)):
        scale = start.scale([(torch.randn(8, 32), spec)], observed(silent), torch.arange(32))
        assert bool(scale.isfinite().all()) and bool((scale > 0).all())


def rewrite(name: str, linear: nn.Linear, record: LinearRecord) -> None:
    linear.weight.data.copy_(record.dequantize(linear.weight.dtype))


def walk(model: LlamaForCausalLM, start: Awq | Rtn, text: list[Tensor]) -> list[LayerLoss]:
    spec = QuantSpec("int3", group_size=32)
    specs = {n: spec for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    return quantize_blocks(model, specs, start, text, place=rewrite)


def outlier_channels(model: LlamaForCausalLM) -> None:
    """Norms that make a few channels large, as trained decoders have them."""
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[:4] = 12.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_loses_less_than_by_rounding(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    outlier_channels(tiny_llama)
    model = nn.Module.to(tiny_llama, dtype).eval()
    text = [torch.randint(4, 500, (2, n), generator=torch.Generator().manual_seed(n)) for n in (40, 64)]
    with torch.no_grad():
        exact = model(text[0]).logits.float()
        errors = []
        for start in (Rtn(RtnSection()), Awq(AwqSection())):
            quantized = copy.deepcopy(model)
            walk(quantized, start, text)
            errors.append(float((quantized(text[0]).logits.float() - exact).square().mean()))
    assert errors[1] < 0.6 * errors[0]
