"""Quantization-aware training that begins at the codes of a starting point."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.errors import DataError
from qtrain.methods.method import build_method
from qtrain.methods.ptq.config import PtqOptions
from qtrain.methods.qat import start as starting
from qtrain.methods.qat.config import QatOptions
from qtrain.methods.qat.method import Qat
from qtrain.modules.packed_identity import packed_layers
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.quantizers import full_precision
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import quantize
from qtrain.ptq.walk import quantize_blocks

CPU = torch.device("cpu")
INITS = ("rtn", "mse", "hqq", "awq", "gptq", "smoothquant")
SPECS: dict[str, dict[str, Any]] = {
    "rows": {"format": "int4"},
    "groups": {"format": "int3", "group_size": 32},
    "asymmetric rows": {"format": "int4", "symmetric": False},
    "asymmetric groups": {"format": "int2", "group_size": 32, "symmetric": False},
    "half-integer": {"format": "int2", "group_size": 32, "mid_rise": True},
    "eight bits": {"format": "int8"},
    "ternary": {"format": "ternary", "group_size": 32},
}
INPUTS = {"format": "int8"}
ROWS = 6
Begin = Callable[..., tuple[Qat, LlamaForCausalLM]]


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for layer in model.model.layers:  # a few loud channels, as real models have
            layer.input_layernorm.weight[:3] *= 8
            layer.post_attention_layernorm.weight[5:7] *= 8
    return model


def text(count: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (1, 24), generator=generator) for _ in range(count)]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> dict[str, LinearRecord]:
    """What the start says about each layer, by name."""
    seen: dict[str, LinearRecord] = {}
    walk = quantize_blocks

    def watched(*args: Any, place: Any, **keys: Any) -> Any:
        def kept(name: str, linear: nn.Linear, record: LinearRecord) -> None:
            seen[name] = record
            place(name, linear, record)

        return walk(*args, place=kept, **keys)

    monkeypatch.setattr(starting, "quantize_blocks", watched)
    return seen


def begin(
    base: LlamaForCausalLM | None = None,
    *,
    calibrated: bool = True,
    restoring: bool = False,
    compute: torch.dtype = torch.float32,
    **keys: Any,
) -> tuple[Qat, LlamaForCausalLM]:
    method = build_method(QatOptions.model_validate({"name": "qat", "calibration_rows": ROWS, **keys}))
    assert isinstance(method, Qat)
    base = tiny() if base is None else base
    model = method.prepare(base, compute_dtype=compute, device=CPU, text=text, restoring=restoring)
    assert isinstance(model, LlamaForCausalLM)
    if calibrated:
        method.calibrate(model, text(ROWS), nullcontext, lambda items, total: items)
    return method, model.eval()


def learned(**spec: Any) -> dict[str, Any]:
    return {**spec, "range": "learned"}


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.cat(list(text(2)))).logits
    return found


def keys_of(init: str, spec: dict[str, Any], range: str = "learned") -> dict[str, Any]:
    activation = INPUTS if init == "smoothquant" else None
    return {"init": init, "weight": {**spec, "range": range}, "activation": activation}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("init", INITS)
def test_layers_begin_at_the_codes_and_scales_of_the_start(
    init: str, spec: dict[str, Any], records: dict[str, LinearRecord]
) -> None:
    _, model = begin(**keys_of(init, spec))
    assert len(records) == 14 and records.keys() == layers(model).keys()
    for name, layer in layers(model).items():
        codes, qparams = layer.codes()
        assert torch.equal(codes, records[name].codes), name
        assert torch.equal(qparams.scale, records[name].scale), name
        if qparams.zero_point is not None:
            zero_point = records[name].zero_point
            assert zero_point is not None and torch.equal(qparams.zero_point, zero_point)
        assert torch.equal(layer.quantized_weight().detach(), records[name].dequantize())
        assert layer.weight_quantizer is not None and layer.weight_quantizer.enabled


@pytest.mark.parametrize("init", ["hqq", "gptq"])
def test_static_ranges_keep_them_too(init: str, records: dict[str, LinearRecord]) -> None:
    _, model = begin(**keys_of(init, SPECS["asymmetric groups"], "static"))
    assert all(torch.equal(layer.codes()[0], records[name].codes) for name, layer in layers(model).items())


def test_weights_that_round_there_by_themselves_stay_and_others_move_just_inside(
    records: dict[str, LinearRecord],
) -> None:
    plain = tiny()
    _, model = begin(**keys_of("gptq", SPECS["groups"]))
    moved = 0
    for name, layer in layers(model).items():
        record, before = records[name], plain.get_parameter(f"{name}.weight").detach()
        stays = quantize(before, record.qparams, record.spec) == record.codes
        weight = layer.weight.detach()
        assert torch.equal(weight[stays], before[stays])
        steps = (weight - record.dequantize()).abs() / record.scale.float().repeat_interleave(32, dim=1)
        torch.testing.assert_close(steps[~stays], torch.full_like(steps[~stays], 0.49))
        moved += int((~stays).sum())
    assert moved > 0


@pytest.mark.parametrize("init", INITS)
def test_the_first_step_has_the_loss_of_post_training_quantization(init: str) -> None:
    spec = SPECS["groups"]
    _, model = begin(**keys_of(init, spec))
    activation = INPUTS if init == "smoothquant" else None
    keys = {"init": init, "weight": spec, "activation": activation, "calibration_rows": ROWS}
    options = PtqOptions.model_validate({"name": "ptq", **keys})
    packed = build_method(options).prepare(tiny(), compute_dtype=torch.float32, device=CPU, text=text).eval()
    for name, layer in packed_layers(packed).items():
        assert torch.equal(layers(model)[name].codes()[0], layer.record().codes), name
    ids = torch.cat(list(text(2)))
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        torch.testing.assert_close(loss.detach(), packed(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("init", ["awq", "smoothquant"])
@pytest.mark.parametrize("range", ["dynamic", "learned"])
def test_folds_leave_full_precision_as_it_was(init: str, range: str) -> None:
    method, model = begin(**keys_of(init, SPECS["groups"], range))
    before = logits(tiny())
    if range == "dynamic":  # nothing but the folds moved weights
        with full_precision(model):
            torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        norm = "model.layers.0.input_layernorm.weight"
        assert not torch.equal(model.get_parameter(norm), tiny().get_parameter(norm))
        assert "keep no ranges" in " ".join(method.lines(model))
    with method.baselines(model)["full"]():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("init", INITS)
def test_the_baselines_are_the_model_before_the_start_and_what_the_start_made(init: str) -> None:
    keys = keys_of(init, SPECS["groups"])
    method, model = begin(**keys, kv_cache={"format": "int8"}, calibrated=False)
    entered, begun = method.baselines(model), logits(model)
    for _ in range(2):
        with entered["full"]():
            assert torch.equal(logits(model), logits(tiny()))
        with entered["ptq"]():
            assert torch.equal(logits(model), begun)
    assert torch.equal(logits(model), begun)
    method.drop_baselines()
    assert method.baselines(model) == {}


def test_the_baseline_is_measured_before_ranges_of_inputs_are_known() -> None:
    inputs = {"format": "int8", "range": "static"}
    method, model = begin(init="gptq", weight=learned(format="int4"), activation=inputs, calibrated=False)
    with method.baselines(model)["ptq"]():
        assert torch.isfinite(logits(model)).all()
    before = [layer.codes() for layer in layers(model).values()]
    method.calibrate(model, text(ROWS), nullcontext, lambda items, total: items)
    for (codes, qparams), layer in zip(before, layers(model).values(), strict=True):
        assert torch.equal(layer.codes()[0], codes) and torch.equal(layer.codes()[1].scale, qparams.scale)


def test_calibration_leaves_the_ranges_of_the_start(records: dict[str, LinearRecord]) -> None:
    _, model = begin(init="gptq", weight={**learned(format="int4"), "calibrate": "mse"})
    assert all(torch.equal(layer.codes()[1].scale, records[name].scale) for name, layer in layers(model).items())


def test_a_bf16_model_is_brought_back_exactly() -> None:
    base = tiny()
    base.bfloat16()
    before = logits(copy.deepcopy(base).float())
    method, model = begin(base, init="gptq", weight=learned(format="int3"), compute=torch.bfloat16, calibrated=False)
    assert {value.dtype for value in (method._before_start or {}).values()} == {torch.bfloat16}
    with method.baselines(model)["full"]():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_quantized_by_the_start(tied: bool, records: dict[str, LinearRecord]) -> None:
    weight = learned(format="int4", group_size=32)
    method, model = begin(tiny(tied), init="gptq", weight=weight, head=True)
    assert len(records) == 15
    assert torch.equal(layers(model)["lm_head"].codes()[0], records["lm_head"].codes)
    with method.baselines(model)["full"]():
        assert torch.equal(logits(model), logits(tiny(tied)))


def test_tied_embedding_and_head_begin_at_one_set_of_codes(records: dict[str, LinearRecord]) -> None:
    weight = learned(format="int8")
    _, model = begin(tiny(tied=True), init="hqq", weight=weight, embedding=weight, head=True)
    assert torch.equal(model.model.embed_tokens.codes()[0], records["lm_head"].codes)


def test_rules_skips_and_ends_are_those_of_the_quantizers(records: dict[str, LinearRecord]) -> None:
    rules = {"*.down_proj": {"weight": {"format": "int8"}}}
    method, model = begin(
        init="gptq", weight=learned(format="int4", group_size=32), rules=rules, skip=["*.k_proj"], first_last="int8"
    )
    assert len(records) == 12 and not any("k_proj" in name for name in records)
    for name, layer in layers(model).items():
        assert layer.weight_quantizer is not None and layer.weight_quantizer.spec == records[name].spec
        if layer.weight_quantizer.section.range == "learned":
            assert torch.equal(layer.codes()[0], records[name].codes)
    # 8 bits at the ends have ranges of their own, unless a rule speaks of the layer: the first q_proj.
    assert "start       gptq, 11 layers begin at its codes, 1 layers keep no ranges" in "\n".join(method.lines(model))


def test_layers_that_are_restored_need_no_start(records: dict[str, LinearRecord], tmp_path: Any) -> None:
    keys = keys_of("gptq", SPECS["groups"])
    method, model = begin(**keys)
    count = len(records)
    method.save(model, tmp_path / "weights")
    again = build_method(QatOptions.model_validate({"name": "qat", **keys}))
    other = again.prepare(tiny(), compute_dtype=torch.float32, device=CPU, restoring=True)  # no text
    again.restore(other, tmp_path / "weights")
    assert len(records) == count and torch.equal(logits(other.eval()), logits(model))
    assert again.baselines(other) == {} and "start       gptq" in again.lines(other)


def test_a_start_that_looks_at_text_wants_some() -> None:
    method = build_method(QatOptions.model_validate({"name": "qat", **keys_of("gptq", SPECS["rows"])}))
    with pytest.raises(DataError, match=r"method.init=gptq looks at text.*\n.*data.train\n.*method.init=hqq"):
        method.prepare(tiny(), compute_dtype=torch.float32, device=CPU)


LEARNED = learned(format="int4")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": "gtpq", "weight": LEARNED}, "did you mean 'gptq'"),
        ({"init": "spqr", "weight": LEARNED}, "outliers in 16 bits.*method.name=peqa"),
        ({"init": "block_ap", "weight": LEARNED}, "distill.layerwise"),
        ({"init": "checkpoint", "weight": LEARNED}, "method.name=peqa"),
        ({"init": "gptq", "weight": {"format": "int4"}}, "method.weight.range=learned"),
        ({"init": "gptq", "weight": {"range": "static", "bounds": (-1, 1)}}, "method.weight.range=learned"),
        ({"init": "gptq", "weight": None, "activation": INPUTS}, "set method.weight.format"),
        ({"init": "gptq", "weight": {"format": "fp8_e4m3", "range": "static"}}, "int2 .. int8 or ternary"),
        ({"init": "gptq", "weight": learned(format="binary")}, "int2 .. int8 or ternary"),
        ({"init": "gptq", "weight": learned(granularity="per_tensor")}, "granularity=per_channel"),
        ({"init": "smoothquant", "weight": LEARNED}, "method.activation.format=int8"),
        ({"init": "gptq", "weight": LEARNED, "lora": {"r": 4}}, "leave lora out"),
        ({"init": "gptq", "weight": LEARNED, "start_step": 3}, "leave start_step out"),
        ({"init": "gptq", "weight": LEARNED, "bits_schedule": {0: "int8", 5: "int4"}}, "leave bits_schedule out"),
        ({"init": "gptq", "weight": LEARNED, "calibration_rows": 0}, "calibration_rows=128"),
    ],
)
def test_what_a_start_does_not_go_with_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QatOptions.model_validate({"name": "qat", **keys})
