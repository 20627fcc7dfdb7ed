from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtrain.errors import ConfigError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.prepare import prepare_modules
from qtrain.modules.quantizers import quantizers
from qtrain.modules.schedule import QuantizationSchedule

STEPS = st.integers(0, 2000)


@given(start=st.integers(0, 1000), freeze=st.none() | st.integers(0, 1000), observed=st.integers(0, 50), step=STEPS)
def test_a_stage_is_a_function_of_the_step(start: int, freeze: int | None, observed: int, step: int) -> None:
    stage = QuantizationSchedule(start, freeze, {}, observed).stage(step)
    assert stage.on == (step >= start)
    assert stage.frozen == (freeze is not None and step >= freeze)
    assert stage.observing == (start - observed <= step < start)
    assert stage.formats == {}


@given(step=STEPS)
def test_bits_follow_the_last_entry_that_is_past(step: int) -> None:
    schedule = QuantizationSchedule(bits={1000: "int4", 100: {"weight": "int8", "activation": "int8"}, 500: "int6"})
    formats = schedule.stage(step).formats
    assert formats["weight"] == ("int8" if step < 500 else "int6" if step < 1000 else "int4")
    assert formats["activation"] == "int8"


def test_changes_are_told_in_words() -> None:
    schedule = QuantizationSchedule(10, 30, {0: "int8", 20: "int4"})
    stages = [schedule.stage(step) for step in (0, 10, 20, 30)]
    told = [after.changes(before) for before, after in zip(stages, stages[1:], strict=False)]
    assert told == [["quantization on"], ["weights int8 -> int4"], ["learned ranges frozen"]]
    assert stages[2].figures() == {
        "quantization/on": 1.0,
        "quantization/ranges_frozen": 0.0,
        "quantization/weight_bits": 4.0,
    }


def test_layers_go_down_to_their_own_bits_and_no_further_and_keep_their_width() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    weight = QuantizerSection(format="int4", range="learned")
    rules: dict[str, Any] = {"1": {"weight": {"format": "int6"}}, "2": {"weight": {"format": "ternary"}}}
    prepare_modules(model, weight=weight, rules=rules)
    own = {name: quantizer.spec.format for name, quantizer in quantizers(model)}
    schedule = QuantizationSchedule(bits={0: "int8", 10: "int5", 20: "int4"})
    seen = []
    for step in (0, 10, 20):
        schedule.apply(model, schedule.stage(step), own)
        seen.append([quantizer.spec.format for _, quantizer in quantizers(model)])
        scale = model[0].weight_quantizer.scale.detach() * model[0].weight_quantizer.spec.quant_max
        assert torch.allclose(scale.squeeze(), model[0].weight.abs().amax(dim=1), rtol=0.01)
    assert seen == [["int8", "int8", "ternary"], ["int5", "int6", "ternary"], ["int4", "int6", "ternary"]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start_step": -1}, "start_step: step -1"),
        ({"bits": {-5: "int8"}}, "bits_schedule: step -5"),
        ({"bits": {0: "fp8_e4m3"}}, r"bits_schedule\[0\]: format 'fp8_e4m3'"),
        ({"bits": {0: {"weights": "int8"}}}, "did you mean 'weight'"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationSchedule(**keys)


def test_more_bits_at_the_end_than_were_asked_for_are_refused() -> None:
    schedule = QuantizationSchedule(bits={0: "int8", 100: "int6"})
    schedule.check_end({"weight": "int6", "activation": "int4"})
    with pytest.raises(ConfigError, match="ends with weights in int6 at step 100, but weight is int4"):
        schedule.check_end({"weight": "int4"})
