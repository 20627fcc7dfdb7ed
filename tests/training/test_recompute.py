"""Levels of recomputation: the same loss and gradients from less and less that is kept."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.errors import ModelError
from qtrain.training import recompute_budget
from qtrain.training.module import LanguageModule
from qtrain.training.recompute import LEVELS, Recompute, free_bytes, trained_bytes
from qtrain.training.recompute_budget import GIB, Estimate, LayerBytes, head_bytes, layer_bytes, probe_batch, settle
from qtrain.training.recompute_offload import OffloadedInputs


def small(layers: int = 4, dropout: float = 0.1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).train()


def step(model: PreTrainedModel, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch, and nothing left behind."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 64, (2, 12))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def kept_bytes(model: PreTrainedModel, run: Callable[[], Tensor]) -> int:
    """Bytes that the graph of ``run`` keeps on the device of the model, its parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    places: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            places[place] = weakref.ref(tensor), tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    total = sum(size for tensor, size in places.values() if tensor() is not None)
    loss.backward()
    model.zero_grad()
    return total


@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_level_gives_the_same_loss_and_gradients_bit_for_bit(level: str) -> None:
    model = small()
    recompute = Recompute(model)
    loss, gradients = step(model)
    after = torch.rand(3)
    recompute.set(level)
    for layer in model.model.layers:
        if level == "offload":
            layer._gradient_checkpointing_func = OffloadedInputs(smallest=0)
            break
    again, found = step(model)
    assert torch.equal(loss, again) and gradients.keys() == found.keys()
    assert all(torch.equal(gradients[name], found[name]) for name in gradients)
    assert torch.equal(after, torch.rand(3))  # dropout has taken as much of the random numbers


def test_each_level_keeps_less() -> None:
    model = small(layers=6)
    recompute = Recompute(model)
    ids = torch.randint(0, 64, (2, 40))

    def run() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    found = {}
    for level in LEVELS[:3]:
        recompute.set(level)
        found[level] = kept_bytes(model, run)
    recompute.set("offload")
    own = OffloadedInputs(smallest=0)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = own
    found["offload"] = kept_bytes(model, run)
    assert found["none"] > 1.5 * found["selective"] > 1.5 * found["full"]
    assert found["full"] - found["offload"] == 6 * 2 * 40 * 32 * 4  # the inputs of the layers
    counts = []
    for count in range(7):
        recompute.set("selective", count)
        counts.append(kept_bytes(model, run))
    falls = {before - after for before, after in zip(counts, counts[1:], strict=False)}
    assert counts[0] == found["none"] and counts[6] == found["full"] and min(falls) > 0


def test_the_estimate_is_what_the_model_keeps() -> None:
    """One layer measured stands for all: what is kept grows by it with each layer."""
    totals = {}
    ids = torch.randint(0, 64, (2, 40))
    for layers in (2, 5):
        model = small(layers)
        totals[layers] = kept_bytes(model, lambda model=model: model(input_ids=ids, use_cache=False).logits.sum())
    model = small(5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    batch = probe_batch(2, 40, 64, packing=False, device=torch.device("cpu"))
    found = layer_bytes(model, model.model.layers[2], batch)
    assert found.saved == (totals[5] - totals[2]) // 3
    assert found.input == 2 * 40 * 32 * 4 and 0 < found.working < found.saved and found.shared > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    packed = probe_batch(2, 41, 64, packing=True, device=torch.device("cpu"))
    assert packed["position_ids"].shape == (2, 41) and int((packed["position_ids"][0] == 0).sum()) == 2
    assert layer_bytes(model, model.model.layers[4], packed).saved > found.saved


SIZES = st.integers(0, 1000)


@given(saved=st.integers(1, 1000), share=st.integers(1, 99), working=SIZES, head=SIZES, free=st.integers(1, 40000))
def test_the_fewest_layers_that_fit_are_chosen(saved: int, share: int, working: int, head: int, free: int) -> None:
    estimate = Estimate(LayerBytes(saved * 100, saved * share, working, 7), 12, head * 100, 9)
    level, count, reason = estimate.choose(free * 100)
    room = free * 100 * (1 - recompute_budget.MARGIN)
    if level in ("none", "selective", "full"):
        assert estimate.of(count) <= room
        assert all(estimate.of(fewer) > room for fewer in range(count))
    else:
        assert all(estimate.of(fewer) > room for fewer in range(13))
        assert ("even so" in reason) == (estimate.offloaded > room)
    assert {"none": count == 0, "selective": 0 < count < 12}.get(level, count == 12)


def test_reasons_name_what_did_not_fit() -> None:
    estimate = Estimate(LayerBytes(2 * GIB, GIB // 32, GIB // 2), 30, GIB // 2, 0)
    assert estimate.choose(80 * GIB) == ("none", 0, "it takes 60.5 GiB of 80.0 free")
    level, count, reason = estimate.choose(44 * GIB)
    assert (level, reason) == ("selective", "none would take 60.5 GiB of 44.0 free") and 0 < count < 30
    # The last layer's turn comes first: to run it again at once saves nothing, unless the head takes more than it.
    assert estimate.choose(4 * GIB)[:2] == ("selective", 29) and estimate.of(30) > estimate.of(29)
    large = Estimate(LayerBytes(2 * GIB, GIB // 32, GIB // 2), 30, 10 * GIB, 0)
    assert large.choose(12 * GIB)[:2] == ("full", 30)
    assert large.choose(11 * GIB) == ("offload", 30, "full would take 10.9 GiB of 11.0 free")
    assert large.choose(10 * GIB)[2] == "even so it may not fit: 10.1 GiB of 10.0 free"


def test_auto_takes_the_level_that_fits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    config = load_recipe(None, "run.recompute=auto", "data.batch_size=2", "data.max_length=64", "data.packing=false")
    assert free_bytes(cpu) is None
    assert str(settle(small(), config, cpu, "")) == "none: the memory of a CPU is not counted"
    model = small()
    need = recompute_budget.estimate(model, Recompute(model), config, cpu, "")
    assert need.fixed == 3 * trained_bytes(model) and need.head == head_bytes(model, 128, whole=False)
    levels = []
    monkeypatch.setattr(recompute_budget, "head_bytes", lambda *_, whole: 10**6)
    need = recompute_budget.estimate(model, Recompute(model), config, cpu, "")
    for wanted in (need.of(0), need.of(0) - 1, need.of(3) - 1, need.of(4) - 1):
        free = int(wanted / (1 - recompute_budget.MARGIN)) + 1
        monkeypatch.setattr(recompute_budget, "free_bytes", lambda device, free=free: free)
        found = settle(model, config, cpu, "")
        levels.append((found.level, found.count, [layer.gradient_checkpointing for layer in found.layers].count(True)))
    assert levels == [("none", 0, 0), ("selective", 1, 1), ("full", 4, 4), ("offload", 4, 4)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("packing", [True, False])
def test_auto_over_a_quantized_base(packing: bool, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters over NF4; packed rows with their mask. What is asked for is found, and nothing is left behind."""
    words = (f"model.path={tiny_llama_dir}", "method.base=nf4", "data.batch_size=2", "data.max_length=64")
    config = load_recipe(None, *words, f"data.packing={packing}", "run.recompute=auto")
    asked: list[int] = []

    def free(device: torch.device) -> int:
        asked.append(1)
        return 2**40 if len(asked) == 1 else 2**20

    monkeypatch.setattr(recompute_budget, "free_bytes", free)
    for level in ("none", "offload"):
        module = LanguageModule(config)
        module.build(torch.device("cpu"))
        assert module.recompute is not None and module.recompute.level == level
        assert all(p.grad is None for p in module.parameters())
    assert "GiB of 0.0 free" in str(module.recompute)


def test_a_layer_that_does_not_fit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recompute_budget, "free_bytes", lambda device: 2 * GIB)
    monkeypatch.setattr(recompute_budget, "layer_bytes", fails)
    found = settle(small(), load_recipe(None, "run.recompute=auto"), torch.device("cpu"), "")
    assert str(found) == "offload: one layer alone exceeds 2.0 GiB free"


def test_auto_is_the_default_and_none_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU is small enough for any layer to be recomputed; on a CPU no layer runs."""
    cpu, model = torch.device("cpu"), small()
    monkeypatch.setattr(recompute_budget, "layer_bytes", lambda *_: pytest.fail("a layer was measured"))
    assert load_recipe(None).run.recompute == "auto"
    assert str(settle(model, load_recipe(None), cpu, "")) == "none: the memory of a CPU is not counted"
    monkeypatch.setattr(recompute_budget, "free_bytes", lambda device: 1)
    sharded = settle(model, load_recipe(None), cpu, "", sharded=True)
    graphs = settle(model, load_recipe(None, "method.name=qat", "run.cuda_graphs=true"), cpu, "")
    model.requires_grad_(False)
    frozen = settle(model, load_recipe(None), cpu, "")
    for found, words in ((sharded, "run.recompute=full"), (graphs, "CUDA graph"), (frozen, "nothing trains")):
        assert found.level == "none" and words in found.reason
        assert not any(layer.gradient_checkpointing for layer in found.layers)


def test_a_layer_that_does_not_run_by_itself_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AttributeError("no such mask")

    monkeypatch.setattr(recompute_budget, "free_bytes", lambda device: 2 * GIB)
    monkeypatch.setattr(recompute_budget, "layer_bytes", fails)
    found = settle(small(), load_recipe(None), torch.device("cpu"), "")
    assert str(found) == "none: no layer could be measured (AttributeError: no such mask)"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_rows_that_are_shorter_than_they_may_be_are_counted_as_they_are(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's longest row, not data.max_length; and a run that is only read measures nothing."""
    (tmp_path / "chats.jsonl").write_text('{"prompt": "count to three", "completion": "1 2 3"}\n' * 3)
    words = (f"model.path={tiny_llama_dir}", f"data.train={tmp_path / 'chats.jsonl'}", "data.packing=false")
    config = load_recipe(None, *words, "data.max_length=512", "data.batch_size=3")
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    data.setup("fit")
    seen: list[torch.Size] = []
    measured = recompute_budget.layer_bytes

    def look(model: Any, layer: Any, batch: Any) -> LayerBytes:
        seen.append(batch["input_ids"].shape)
        return measured(model, layer, batch)

    monkeypatch.setattr(recompute_budget, "free_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(recompute_budget, "layer_bytes", look)
    module.build(torch.device("cpu"), data)
    assert seen == [(3, next(iter(data.train_dataloader()))["input_ids"].shape[1])] and seen[0][1] < 64
    assert module.recompute is not None and str(module.recompute).startswith("none: it takes 0.0 GiB of 80.0 free")


def test_a_level_that_is_named_is_taken() -> None:
    for level in LEVELS:
        config = load_recipe(None, f"run.recompute={level}")
        found = settle(small(), config, torch.device("cpu"), "")
        assert found.level == level
    assert str(settle(small(), load_recipe(None, "run.recompute=selective"), torch.device("cpu"), "")) == (
        "selective, the first 2 of 4 layers: run.recompute"
    )


def test_whole_logits_take_more_than_a_chunk() -> None:
    model = small()
    assert head_bytes(model, 100, whole=True) > head_bytes(model, 100, whole=False)


def test_down_the_levels() -> None:
    recompute = Recompute(small())
    seen = [recompute.level]
    while recompute.lower():
        seen.append(recompute.level)
    assert tuple(seen) == LEVELS and not recompute.lower()
    single = Recompute(small(layers=1))
    assert single.lower() and single.level == "full"


def test_no_warning_and_no_gradients_of_embeddings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small()
        model.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        Recompute(model).set("full")
        step(model)
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_layers_that_cannot_run_again_are_said() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    recompute = Recompute(model)
    recompute.layers = []
    with pytest.raises(ModelError, match="run.recompute=full: no layer of gpt2"):
        recompute.set("full")
    recompute.set("none")
    assert not recompute.lower()


def test_copies_are_sent_ahead_and_let_go() -> None:
    """When the last layer asks for its input, the one before is on its way too."""
    inputs = OffloadedInputs(smallest=0)
    x = torch.randn(4, 4, requires_grad=True)
    first = inputs._pack(x.detach())
    second = inputs._pack(x.detach() + 1)
    assert not isinstance(first, Tensor) and not isinstance(second, Tensor)
    assert torch.equal(inputs._unpack(second), x + 1) and first.back is not None and second.back is None
    assert torch.equal(inputs._unpack(first), x) and torch.equal(inputs._unpack(second), x + 1)
    gone = weakref.ref(first)
    del first
    assert gone() is None and torch.equal(inputs._unpack(second), x + 1)
    assert isinstance(OffloadedInputs()._pack(x), Tensor)  # too small to be worth it
    assert isinstance(inputs._pack(torch.arange(9)), Tensor)


@pytest.mark.gpu
def test_offload_on_a_gpu() -> None:
    """The same bits, and the inputs of the layers off the device between forward and backward."""
    model = small(layers=6, dropout=0.0).cuda()
    ids = torch.randint(0, 64, (64, 256), device="cuda")
    held: dict[str, int] = {}
    gradients: list[dict[str, Tensor]] = []
    for level in ("full", "full", "offload", "offload"):
        Recompute(model).set(level)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        torch.cuda.synchronize()
        held[level] = torch.cuda.memory_allocated()
        loss.backward()
        # Of the embedding torch adds up rows in whatever order they come.
        taken = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None and "embed_tokens" not in n]
        gradients.append({name: gradient.clone() for name, gradient in taken})

    def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
        return {n: float((one[n] - other[n]).abs().max()) for n in one if not torch.equal(one[n], other[n])}

    assert not farthest(gradients[0], gradients[1]), "two equal steps differ: the device's own sums do"
    assert not farthest(gradients[0], gradients[2]) and not farthest(gradients[0], gradients[3])
    assert held["full"] - held["offload"] > 5 * 64 * 256 * 32 * 4
