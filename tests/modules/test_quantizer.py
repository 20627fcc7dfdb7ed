"""One quantizer: the codes of training, evaluation and export, whatever the dtype, eager or compiled."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.quantizer import Quantizer
from qtrain.numerics.affine import dequantize

WEIGHTS = [
    {"format": "int4"},
    {"format": "int4", "group_size": 16},
    {"format": "int3", "group_size": 16, "symmetric": False},
    {"format": "int8", "granularity": "per_tensor"},
    {"format": "int4", "granularity": "per_block", "group_size": 64},
    {"format": "int4", "group_size": 16, "range": "learned", "calibrate": "mse"},
    {"format": "int4", "range": "learned", "calibrate": "lsq"},
    {"format": "int4", "symmetric": False, "group_size": 16, "range": "learned", "calibrate": "mse"},
    {"format": "int2", "mid_rise": True, "group_size": 16, "range": "learned", "calibrate": "mse"},
    {"format": "ternary", "range": "learned", "calibrate": "mse"},
    {"format": "ternary"},
    {"format": "binary", "range": "learned"},
    {"format": "fp8_e4m3"},
    {"format": "fp8_e5m2", "granularity": "per_tensor"},
    {"format": "int4", "range": "static", "calibrate": "percentile"},
    {"format": "int4", "scale_dtype": "fp16"},
]


def of(keys: dict[str, object], weight: torch.Tensor | None = None) -> Quantizer:
    return Quantizer((QuantizerSection if weight is None else WeightSection).model_validate(keys), weight)


@pytest.mark.parametrize("keys", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_what_the_codes_come_back_as(keys: dict[str, object], dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizer = of(keys, weight)
    codes, qparams = quantizer.codes(weight)
    assert torch.equal(quantizer(weight), dequantize(codes, qparams, quantizer.spec, dtype))
    assert quantizer(weight).dtype == dtype
    quantizer.eval()
    assert torch.equal(quantizer.codes(weight)[0], codes)
    if not codes.dtype.is_floating_point:
        assert codes.dtype == torch.int8
        assert int(codes.min()) >= quantizer.spec.quant_min and int(codes.max()) <= quantizer.spec.quant_max


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on autograd functions
@pytest.mark.parametrize("keys", WEIGHTS[1:6:2] + WEIGHTS[7:9], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_decides_the_same_codes(keys: dict[str, object], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    quantizer = of(keys, weight)
    compiled = torch.compile(lambda x: quantizer(x) * 1.0, backend="aot_eager", fullgraph=True)
    eager, other = quantizer(weight), compiled(weight)
    assert torch.equal(eager, other)
    upper = torch.randn_like(eager)
    (expected,) = torch.autograd.grad(eager, weight, upper)
    (found,) = torch.autograd.grad(other, weight, upper)
    assert torch.equal(expected, found)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
    keys=st.sampled_from([w for w in WEIGHTS if "range" not in w]),
)
def test_dynamic_ranges_never_clip_and_err_by_half_a_step(
    rows: int, groups: int, scale: float, seed: int, keys: dict[str, object]
) -> None:
    x = torch.randn(4 * rows, 64 * groups, generator=torch.Generator().manual_seed(seed)) * scale
    x[0] = 0.0
    quantizer = of(keys, x)
    found = quantizer(x)
    assert bool(found.isfinite().all())
    assert torch.equal(of(keys, x.t().contiguous().t())(x.t().contiguous().t()), found)
    if keys["format"] in ("int3", "int4", "int8"):
        step = quantizer.qparams(x).scale.float()
        if quantizer.spec.granularity == "per_block":
            return
        widest = step.repeat_interleave(x.shape[1] // step.shape[1], dim=1) if step.shape[0] > 1 else step
        # A scale rounded to 8 bits of mantissa may fall short of the extreme by 2^-9 of the range: 127 steps / 512.
        assert bool(((found - x).abs() <= widest * (0.5 + 0.51)).all())
        assert bool((found[0] == 0).all()) or quantizer.spec.granularity == "per_tensor"


def test_learned_ranges_are_parameters_from_construction() -> None:
    quantizer = of({"range": "learned", "symmetric": False}, torch.randn(4, 8))
    assert {name for name, _ in quantizer.named_parameters()} == {"scale", "offset"}
    activation = of({"range": "learned"})
    assert {name for name, _ in activation.named_parameters()} == {"scale"} == set(activation.state_dict())
    with pytest.raises(ModelError, match="no range yet"):
        activation(torch.randn(2, 8))
    activation.load_state_dict({"scale": torch.tensor([[0.5]])})
    assert torch.equal(activation(torch.tensor([[0.6, 1.3]])), torch.tensor([[0.5, 1.5]]))


@pytest.mark.parametrize("calibrate", ["min_max", "moving_average", "percentile", "mse", "kl"])
def test_static_ranges_are_observed(calibrate: str) -> None:
    quantizer = of({"range": "static", "calibrate": calibrate})
    quantizer.observe()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert quantizer(x) is x
    quantizer.settle()
    assert (quantizer(x) - x).square().mean() < 1e-3
    assert set(quantizer.state_dict()) == {"scale"} and not list(quantizer.parameters())


def test_bounds_known_in_advance_need_no_data() -> None:
    quantizer = of({"range": "static", "bounds": "sigmoid_input"})
    assert quantizer.scale is not None
    assert math.isclose(float(quantizer.scale), 6 / 127, rel_tol=1e-6)
    assert float(quantizer(torch.tensor([[9.0]]))) == pytest.approx(6.0)
    lopsided = of({"range": "static", "bounds": [0.0, 1.0], "symmetric": False})
    assert float(lopsided(torch.tensor([[0.5]]))) == pytest.approx(0.5, abs=1 / 255)
    with pytest.raises(ValueError, match="softmax has no input"):
        QuantizerSection(range="static", bounds="softmax_input")


def test_another_number_of_bits_keeps_the_range() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantizer = of({"format": "int8", "range": "learned"}, weight)
    coarse = of({"format": "int4", "range": "learned"}, weight)
    quantizer.change_format("int4")
    assert quantizer.scale is not None and coarse.scale is not None
    assert torch.allclose(quantizer.scale, coarse.scale, rtol=2**-7)
    assert quantizer.spec == coarse.spec


def test_conventions_of_consumers() -> None:
    x = torch.tensor([[127.0, -63.5]])
    assert float(of({"format": "int8"}).qparams(x).scale) == 1.0
    assert float(of({"format": "int8", "convention": "compressed-tensors"}).qparams(x).scale) == pytest.approx(
        127 / 127.5
    )
    lopsided = of({"format": "int8", "symmetric": False}).qparams(x)
    assert float(lopsided.scale) == pytest.approx(190.5 / 255) and lopsided.zero_point is not None
    assert int(lopsided.zero_point) == round(63.5 / (190.5 / 255)) - 128


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"format": "int9"}, "did you mean"),
        ({"granularity": "per_group"}, "group_size of at least 1"),
        ({"bounds": [0, 1]}, "range: static"),
        ({"range": "pact", "format": "binary"}, "format: int4"),
        ({"range": "learned", "format": "fp8_e4m3"}, "dynamic or static"),
        ({"calibrate": "lsq", "symmetric": False, "range": "learned"}, "calibrate: mse"),
        ({"mid_rise": True, "format": "int2", "symmetric": False}, "around zero"),
        ({"calibrate": "kl", "symmetric": False, "range": "static"}, "calibrate: mse"),
        ({"calibrate": "percentile", "format": "binary", "range": "learned"}, "calibrate: mse"),
    ],
)
def test_what_a_section_refuses(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizerSection.model_validate(keys)


def test_no_histogram_is_made_for_each_group_of_a_weight() -> None:
    with pytest.raises(ValueError, match="calibrate: mse"):
        WeightSection(group_size=64, range="static", calibrate="kl")


def test_ranges_stay_in_fp32_whatever_the_model_is_cast_to() -> None:
    weight = torch.randn(4, 8)
    quantizer = of({"range": "learned", "symmetric": False}, weight)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.to("meta").state_dict()["scale"].is_meta
