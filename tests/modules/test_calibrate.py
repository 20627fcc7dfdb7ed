from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.errors import ModelError
from qtrain.modules.calibrate import calibrate, start_weights
from qtrain.modules.config import QuantizerSection
from qtrain.modules.prepare import prepare_modules
from qtrain.modules.quantizers import quantizers

STATIC = QuantizerSection(format="int8", range="static")
INT8 = QuantizerSection(format="int8")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))


@given(seed=st.integers(0, 2**16), count=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_min_max_covers_all_batches_and_nothing_else(seed: int, count: int) -> None:
    model = two_layers()
    prepare_modules(model, weight=INT8, activation=STATIC)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, 4, generator=generator) for _ in range(count)]
    assert calibrate(model, batches) == ["0.input_quantizer", "3.input_quantizer"]
    largest = torch.stack(batches).abs().max()
    assert torch.isclose(model[0].input_quantizer.scale * 127, largest)


def test_modes_gradients_and_outputs_are_left_as_they_were() -> None:
    model = two_layers()
    model[1].eval()
    prepare_modules(model, weight=INT8, activation=STATIC)
    seen: list[bool] = []
    model[3].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled() or model.training))
    calibrate(model, [torch.randn(2, 4)])
    assert seen == [False]
    assert model.training and not model[1].training and model[0].input_quantizer.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(quantizer.observer is None for _, quantizer in quantizers(model))
    model(torch.randn(2, 4)).sum().backward()


def test_a_normalization_that_was_never_trained_takes_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    prepare_modules(model, weight=INT8, activation=STATIC)
    batch = 100 * torch.randn(64, 4)
    calibrate(model, [batch])
    norm, head = model[1], model[3]
    assert isinstance(norm, nn.BatchNorm1d) and not norm.num_batches_tracked
    assert norm.running_mean is not None and not norm.running_mean.any()
    normalized = norm.train()(model[0](batch)).relu().max()
    assert head.input_quantizer.scale.item() == pytest.approx(normalized.item() / 127, rel=0.01)
    calibrate(model, [batch])  # it has running statistics now
    evaluated = norm.eval()(model[0](batch)).relu().max()
    assert evaluated > 2 * normalized
    assert head.input_quantizer.scale.item() == pytest.approx(evaluated.item() / 127, rel=0.01)


def test_batches_of_every_make() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x + y)

    model = Sum()
    prepare_modules(model, weight=INT8, activation=STATIC)
    ones = torch.ones(2, 4)
    calibrate(model, [(ones, ones), {"x": ones, "y": 2 * ones}])
    assert torch.isclose(model.linear.input_quantizer.scale * 127, torch.tensor(3.0))
    calibrate(model, [5.0], lambda value: model(ones * value, ones))
    assert torch.isclose(model.linear.input_quantizer.scale * 127, torch.tensor(6.0))


def test_a_layer_that_no_batch_reached_is_named_and_the_others_are_ready() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    prepare_modules(model, weight=INT8, activation=STATIC)
    with pytest.raises(ModelError, match=r"did not reach unused\.input_quantizer") as caught:
        calibrate(model, [torch.randn(2, 4)])
    assert "skip=['unused']" in str(caught.value)
    assert model.used.input_quantizer.ready and not model.unused.input_quantizer.ready
    assert model.unused.input_quantizer.observer is None


def test_a_batch_that_fails_leaves_no_observer_behind() -> None:
    model = two_layers()
    prepare_modules(model, weight=INT8, activation=STATIC)
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.randn(2, 4), torch.randn(2, 5)])
    assert all(quantizer.observer is None for _, quantizer in quantizers(model)) and model.training


def test_given_bounds_and_a_given_pact_bound_stay() -> None:
    model = two_layers()
    given_alpha = QuantizerSection(format="int4", symmetric=False, range="pact", pact_alpha=3.0)
    known = QuantizerSection(range="static", bounds=(-2.0, 2.0))
    prepare_modules(model, weight=INT8, activation=known, pact=given_alpha)
    assert calibrate(model, [torch.randn(2, 4)]) == []
    assert model[2].quantizer.alpha.item() == 3.0


def test_pacts_bound_comes_from_data_where_none_is_given() -> None:
    model = two_layers()
    prepare_modules(model, weight=INT8, pact=QuantizerSection(format="int4", symmetric=False, range="pact"))
    x = torch.randn(16, 4)
    assert calibrate(model, [x]) == ["2.quantizer"]
    reached = torch.relu(model[0](x)).max()
    assert torch.isclose(model[2].quantizer.alpha.squeeze(), reached)


def test_weights_start_from_what_they_are_now() -> None:
    model = two_layers()
    prepare_modules(model, weight=QuantizerSection(format="int4", range="learned"))
    quantizer = model[0].weight_quantizer
    before = quantizer.scale.detach().clone()
    with torch.no_grad():
        model[0].weight.mul_(2)
    start_weights(model)
    assert torch.equal(quantizer.scale, before)
    start_weights(model, again=True)
    assert torch.allclose(quantizer.scale, 2 * before, rtol=0.01)


def test_weights_that_came_to_be_after_the_quantizer_get_their_range() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8))
    prepare_modules(model, weight=QuantizerSection(format="int4", range="learned"))
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    calibrate(model, [])
    assert bool(model[0].weight_quantizer.scale.isfinite().all())
    model(torch.randn(2, 4))
