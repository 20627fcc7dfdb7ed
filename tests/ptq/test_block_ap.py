"""Block-AP on tiny decoders: its errors, its codes, its cache, and what it gains over rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qtrain.errors import CheckpointError, DataError, ModelError
from qtrain.modules.block_chain import BlockError
from qtrain.modules.blocks import decoder_blocks, states
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import quantize
from qtrain.numerics.ranges import search_qparams
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.block_ap import block_ap
from qtrain.ptq.block_start import nearest_weights, record_of, trainable_copy
from qtrain.ptq.block_training import Split
from qtrain.ptq.config import BlockApSection, GptqSection, MseSection, RtnSection
from qtrain.ptq.gptq import Gptq
from qtrain.ptq.mse import Mse
from qtrain.ptq.rtn import Rtn
from qtrain.ptq.start import Start
from qtrain.ptq.walk import quantize_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
SPEC = QuantSpec("int2", symmetric=False, group_size=16, scale_dtype="bf16")
FAST = BlockApSection(start="mse", epochs=3, batch_size=4, weight_lr=2e-3, range_lr=2e-3, validation=0)
Records = dict[str, LinearRecord]


def tiny(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5))
    if kind == "gemma":
        return GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def text(count: int = 10, length: int = 12, vocab: int = 64) -> Tensor:
    return torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(1))


def layers(model: PreTrainedModel, spec: QuantSpec = SPEC) -> dict[str, QuantSpec]:
    blocks = set(decoder_blocks(model)[1].modules())
    return {name: spec for name, module in model.named_modules() if type(module) is nn.Linear and module in blocks}


def placing(model: PreTrainedModel, records: Records) -> Any:
    """Puts packed layers into the model and keeps their records."""

    def place(name: str, linear: nn.Linear, record: LinearRecord) -> None:
        assert model.get_submodule(name) is linear
        records[name] = record
        model.set_submodule(name, PackedLinear.from_record(record, linear.bias))

    return place


def run(model: PreTrainedModel, rows: Any, options: BlockApSection = FAST, **others: Any) -> tuple[Records, Any]:
    records: Records = {}
    errors = block_ap(
        model, others.pop("specs", layers(model)), rows, place=placing(model, records), options=options, **others
    )
    return records, errors


def same(one: Records, other: Records) -> bool:
    def parts(record: LinearRecord) -> list[Tensor]:
        return [part for part in (record.codes, record.scale, record.zero_point) if part is not None]

    return list(one) == list(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for name in one
        for a, b in zip(parts(one[name]), parts(other[name]), strict=True)
    )


def leaving(model: PreTrainedModel, block: int, rows: Tensor) -> Tensor:
    """Output of a block in an ordinary forward of the model."""
    seen: list[Tensor] = []
    handle = decoder_blocks(model)[1][block].register_forward_hook(lambda _, __, output: seen.append(states(output)))
    with torch.no_grad():
        model.eval()(input_ids=rows, use_cache=False)
    handle.remove()
    return seen[0]


def distance(model: PreTrainedModel, original: PreTrainedModel, block: int, rows: Tensor) -> float:
    return float(F.mse_loss(leaving(model, block, rows), leaving(original, block, rows)))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "neox"])
def test_errors_fall_and_are_those_of_the_placed_model(kind: str) -> None:
    model, rows = tiny(kind), text()
    original = copy.deepcopy(model)
    rounded = copy.deepcopy(model)
    quantize_blocks(rounded, layers(rounded), Mse(MseSection()), [rows], place=placing(rounded, {}))
    records, errors = run(model, rows)
    assert list(records) == list(layers(original))
    assert [error.name.split(".")[-2:] for error in errors] == [["layers", f"{k}"] for k in range(3)]
    assert all(error.after < 0.95 * error.before for error in errors), errors
    assert errors[0].before == pytest.approx(distance(rounded, original, 0, rows), rel=1e-4)
    for k, error in enumerate(errors):
        assert error.after == pytest.approx(distance(model, original, k, rows), rel=1e-4)


def test_nothing_but_the_placed_layers_changes() -> None:
    model = tiny("neox").train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    records: Records = {}
    block_ap(model, layers(model), text(), place=lambda name, _, record: records.update({name: record}), options=FAST)
    assert len(records) == 12
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_layers_that_are_not_named_stay_and_a_block_may_have_none() -> None:
    model, rows = tiny(), text()
    original = copy.deepcopy(model)
    names = {name: spec for name, spec in layers(model).items() if ".1." not in name and "down_proj" not in name}
    records, errors = run(model, rows, specs=names)
    assert list(records) == list(names) and len(errors) == 3
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert errors[1].before == errors[1].after == pytest.approx(distance(model, original, 1, rows), rel=1e-4)
    assert errors[2].after == pytest.approx(distance(model, original, 2, rows), rel=1e-4)


def test_blocks_after_the_last_named_layer_do_not_run() -> None:
    model = tiny()
    names = {name: spec for name, spec in layers(model).items() if ".1." in name}
    _, errors = run(model, text(), specs=names)
    assert [error.name for error in errors] == ["model.layers.0", "model.layers.1"]
    assert errors[0].before == 0 and errors[1].after < errors[1].before
    assert run(tiny(), text(), specs={}) == ({}, [])


def test_each_layer_has_its_own_bits() -> None:
    model = tiny()
    specs = {
        name: QuantSpec("int4", granularity="per_channel", group_size=None) if "self_attn" in name else SPEC
        for name in layers(model)
    }
    records, errors = run(model, text(), specs=specs)
    assert {name: record.spec for name, record in records.items()} == specs
    assert all(error.after < error.before for error in errors)


SPECS = st.builds(
    QuantSpec,
    format=st.sampled_from(["int2", "int3", "int4"]),
    symmetric=st.just(False),
    group_size=st.sampled_from([8, 16]),
    scale_dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
) | st.builds(
    QuantSpec,
    format=st.sampled_from(["int2", "int3", "int4"]),
    group_size=st.sampled_from([8, 16]),
    full_range=st.booleans(),
    mid_rise=st.booleans(),
    scale_dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
)


@settings(max_examples=30, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 99))
def test_a_record_is_what_was_multiplied_bit_for_bit(spec: QuantSpec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = nn.Sequential(nn.Linear(16, 6))
    with torch.no_grad():
        block[0].weight.copy_(torch.randn(6, 16, generator=generator))
    weight = block[0].weight.detach()
    codes = torch.randint(spec.quant_min, spec.quant_max + 1, (6, 16), generator=generator, dtype=torch.int8)
    start = LinearRecord(codes, *search_qparams(weight, spec), spec)
    trained = trainable_copy(block, {"0": start})
    layer = trained.get_submodule("0")
    assert isinstance(layer, QuantLinear) and layer.weight_quantizer is not None
    assert torch.equal(record_of(layer).codes, codes)
    assert torch.equal(record_of(layer).dequantize(), start.dequantize())
    rounded = quantize(weight, start.qparams, spec)
    near = nearest_weights(weight, LinearRecord(rounded, *start.qparams, spec))
    assert float((near - weight).abs().max()) <= 0.011 * float(start.scale.max())
    with torch.no_grad():  # as far from the start as training goes
        for parameter in [layer.weight, *layer.weight_quantizer.parameters()]:
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    record = record_of(layer)
    assert record.spec == spec
    assert torch.equal(record.dequantize(), layer.quantized_weight())
    assert torch.equal(layer(torch.eye(16)), PackedLinear.from_record(record, layer.bias)(torch.eye(16)))


def test_the_trained_layer_is_the_placed_one() -> None:
    model, rows = tiny(), text()
    original = copy.deepcopy(model)
    records, _ = run(model, rows)
    moved = 0
    for name, record in records.items():
        weight = original.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        start = search_qparams(weight, SPEC)
        moved += int((record.codes != quantize(weight, start, SPEC)).sum())
        assert record.scale.dtype == torch.bfloat16 and not torch.equal(record.scale, start.scale)
    assert moved > 100


@pytest.mark.parametrize(("start", "judge"), [("mse", Mse(MseSection())), ("gptq", Gptq(GptqSection()))])
def test_a_training_that_does_harm_leaves_the_start(start: str, judge: Start[Any]) -> None:
    changes = {"start": start, "weight_lr": 30.0, "range_lr": 30.0}
    records, errors = run(tiny("neox"), text(), FAST.model_copy(update=changes))
    assert all(error.after == error.before for error in errors)
    expected: Records = {}
    model = tiny("neox")
    quantize_blocks(model, layers(model), judge, [text()], place=placing(model, expected), sequential=False)
    for name, record in records.items():
        same_codes = (record.codes == expected[name].codes).float().mean()
        # The same Hessians but for the order of their sums.
        assert same_codes > 0.98 and torch.isclose(record.scale, expected[name].scale, rtol=0.02).float().mean() > 0.98


def test_codes_of_gptq_are_a_better_start() -> None:
    ranged, fed = (run(tiny(), text(40), FAST.model_copy(update={"start": start}))[1] for start in ("mse", "gptq"))
    assert fed[0].before < 0.8 * ranged[0].before
    assert fed[0].after < ranged[0].after and fed[2].after < ranged[2].after


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.3, 3), (10, 0.01, 1), (2, 0.9, 1), (1, 0.5, 1), (5, 0, 5)])
def test_rows_are_held_out(count: int, share: float, held: int) -> None:
    split = Split.of(count, share, seed=3)
    assert len(split.held_out) == held
    both = torch.cat([split.trained, split.held_out]).sort().values
    assert torch.equal(both, torch.arange(count)) or len(split.trained) == held == count


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_number_of_rows(count: int) -> None:
    model = tiny()
    options = FAST.model_copy(update={"validation": 0.3, "epochs": 2})
    records, errors = run(model, list(text(count)), options)
    assert len(records) == 21 and all(error.after <= error.before for error in errors)


@pytest.mark.parametrize("way", ["bf16 model", "autocast", "bf16 storage"])
def test_16_bit_dtypes(way: str) -> None:
    model = tiny("qwen2")
    others: dict[str, Any] = {}
    if way == "bf16 model":
        model.to(torch.bfloat16)
    elif way == "autocast":
        others["context"] = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    else:
        others["storage"] = torch.bfloat16
    _, errors = run(model, text(), **others)
    assert all(error.after < 0.95 * error.before for error in errors), errors


class Stopped(Exception):
    pass


def stopping(at: int, seen: list[int]) -> Any:
    def progress(items: Iterator[int], total: int) -> Iterator[int]:
        seen.append(total)
        for item in items:
            if item == at:
                raise Stopped
            yield item

    return progress


CACHED = FAST.model_copy(update={"validation": 0.2, "epochs": 1})
STEPS = 2  # 8 rows of 10 in batches of 4


@pytest.mark.parametrize("at", [0, STEPS - 1, STEPS, 2 * STEPS + 1])
def test_a_stopped_run_goes_on_with_the_next_block(tmp_path: Path, at: int) -> None:
    undisturbed, expected = run(tiny(), text(), CACHED)
    totals: list[int] = []
    with pytest.raises(Stopped):
        run(tiny(), text(), CACHED, cache=tmp_path, progress=stopping(at, totals))
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == [f"block-{k:03d}.safetensors" for k in range(at // STEPS)]
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == sorted(
        [f"full-{at // STEPS + 1}.bin", f"quantized-{at // STEPS}.bin"]
    )
    resumed, errors = run(tiny(), text(), CACHED, cache=tmp_path, progress=stopping(-1, totals))
    assert totals == [3 * STEPS, 3 * STEPS - at // STEPS * STEPS]
    assert same(resumed, undisturbed) and errors == expected
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".safetensors"] * 3]


def test_a_run_stopped_while_it_places_goes_on_too(tmp_path: Path) -> None:
    undisturbed, expected = run(tiny(), text(), CACHED)
    model, placed = tiny(), []

    def place(name: str, linear: nn.Linear, record: LinearRecord) -> None:
        if ".1." in name:
            raise Stopped
        linear.weight.data.copy_(record.dequantize())
        placed.append(name)

    with pytest.raises(Stopped):
        block_ap(model, layers(model), text(), place=place, options=CACHED, cache=tmp_path)
    assert len(placed) == 7
    (tmp_path / ".quantized-2.bin.abc.tmp").write_bytes(b"half")
    (tmp_path / "full-2.bin").unlink()  # what is missing is computed again
    resumed, errors = run(tiny(), text(), CACHED, cache=tmp_path)
    assert same(resumed, undisturbed) and errors == expected
    assert not list(tmp_path.glob(".*"))


def test_a_finished_cache_is_placed_without_running_the_model(tmp_path: Path) -> None:
    written, expected = run(tiny(), text(), CACHED, cache=tmp_path)
    model, reported = tiny(), []
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    read, errors = run(model, text(), CACHED, cache=tmp_path, report=reported.append)
    assert same(read, written) and errors == expected and not reported


def test_files_are_those_of_one_block(tmp_path: Path) -> None:
    seen: list[dict[str, int]] = []

    def report(error: BlockError) -> None:
        seen.append({path.name: path.stat().st_size for path in tmp_path.glob("*.bin")})

    run(tiny(), text(), CACHED, cache=tmp_path, storage=torch.bfloat16, report=report)
    size = 10 * 12 * 32 * 2
    assert seen == [{f"full-{k + 1}.bin": size, f"quantized-{k}.bin": size} for k in range(3)]


@pytest.mark.parametrize("other", ["model", "layers", "rows", "seed", "range_lr", "storage", "compute"])
def test_the_cache_of_another_run_is_refused(tmp_path: Path, other: str) -> None:
    run(tiny(), text(), CACHED, cache=tmp_path)
    model, rows, options = tiny(), text(), CACHED
    others: dict[str, Any] = {}
    if other == "model":
        model.get_submodule("model.layers.2.mlp.up_proj").weight.data.mul_(1.01)
    elif other == "layers":
        others["specs"] = layers(model) | {"model.layers.1.mlp.up_proj": QuantSpec("int3", group_size=16)}
    elif other == "rows":
        rows[3, 5] += 1
    elif other == "seed":
        others["seed"] = 1
    elif other == "range_lr":
        options = CACHED.model_copy(update={"range_lr": 1e-5})
    elif other == "storage":
        others["storage"] = torch.float16
    else:
        others["context"] = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"another run: {other} differ(.|\n)*remove the directory") as refused:
        run(model, rows, options, cache=tmp_path, **others)
    assert str(tmp_path) in str(refused.value)


def test_what_is_not_finite_is_told_by_row() -> None:
    model, rows = tiny(), text()
    rows[6] = 2  # the token 2 is in no other row
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = float("nan")
    with pytest.raises(DataError, match=r"enters layers\.0 holds NaN or inf on 1 of 10 rows \(the first is row 6\)"):
        run(model, rows)
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = 1e6
    with pytest.raises(DataError, match=r"row 6(.|\n)*finite numbers of float16"):
        run(model, rows, storage=torch.float16)


def test_what_cannot_be_trained_is_refused() -> None:
    model, rows = tiny(), text()
    for name, words in {
        "model.layers.0.mlp.up_proi": "did you mean 'model.layers.0.mlp.up_proj'",
        "lm_head": "'lm_head' lies outside of model.layers",
        "model.layers.0.mlp.act_fn": "is a SiLU",
    }.items():
        with pytest.raises(ModelError, match=words):
            run(model, rows, specs=layers(model) | {name: SPEC})
    with pytest.raises(ModelError, match="ranges of int2 .. int8 train"):
        run(model, rows, specs=dict.fromkeys(layers(model), QuantSpec("ternary", group_size=16)))
    with pytest.raises(DataError, match="rows of 2 lengths, from 7 to 12 tokens"):
        run(model, [*rows, rows[0, :7]])
    for empty in ([], text(0)):
        with pytest.raises(DataError, match="no rows|rows of shape"):
            run(model, empty)


@pytest.fixture(scope="module")
def taught() -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model that has learned which tokens follow which two; such text to quantize on, and to judge by."""
    torch.manual_seed(0)
    follow = torch.randint(0, 48, (48, 48, 3))

    def sample(count: int, length: int = 32) -> Tensor:
        ids = torch.randint(0, 48, (count, 2))
        for _ in range(length - 2):
            choice = torch.randint(0, 3, (count, 1))
            ids = torch.cat([ids, follow[ids[:, -2], ids[:, -1]].gather(1, choice)], dim=1)
        return ids

    config = LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.initializer_range = 0.05
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(160):
        ids = sample(32)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), sample(96), sample(64)


def divergence(model: PreTrainedModel, original: PreTrainedModel, rows: Tensor) -> float:
    """KL of the quantized model's next token from the full-precision one's, nats a token."""
    with torch.no_grad():
        p, q = (m(input_ids=rows).logits.log_softmax(-1).flatten(0, 1) for m in (original, model))
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_closer_to_full_precision_than_rounding(
    taught: tuple[PreTrainedModel, Tensor, Tensor], symmetric: bool
) -> None:
    original, rows, held_out = taught
    spec = QuantSpec("int2", symmetric=symmetric, group_size=32, scale_dtype="bf16")
    starts: list[Start[Any]] = [Rtn(RtnSection()), Mse(MseSection()), Gptq(GptqSection())]
    found = {}
    for start in starts:
        model = copy.deepcopy(original)
        quantize_blocks(model, layers(model, spec), start, [rows], place=placing(model, {}))
        found[type(start).__name__] = divergence(model, original, held_out)
    model = copy.deepcopy(original)
    options = BlockApSection(epochs=6, batch_size=4, weight_lr=1e-3, range_lr=1e-3)
    run(model, rows, options, specs=layers(model, spec))
    found["Block-AP"] = divergence(model, original, held_out)
    assert found["Block-AP"] < 0.8 * min(found[type(start).__name__] for start in starts), found


@pytest.mark.gpu
def test_on_a_gpu_with_files_and_autocast(tmp_path: Path) -> None:
    model = tiny("qwen2").to("cuda")
    context = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    options = FAST.model_copy(update={"start": "gptq"})
    stop = stopping(4, [])
    with pytest.raises(Stopped):
        run(model, text(), options, context=context, cache=tmp_path, progress=stop)
    model = tiny("qwen2").to("cuda")
    records, errors = run(model, text(), options, context=context, cache=tmp_path)
    assert all(record.codes.is_cuda and record.scale.is_cuda for record in records.values())
    assert all(error.after < error.before for error in errors)
