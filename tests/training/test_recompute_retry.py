"""Where memory runs out in the first steps, training goes on and ends at the weights of an undisturbed run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.modules.quant_linear import QuantLinear
from qtrain.modules.shared_outputs import SharedOutputs
from qtrain.modules.token_loss import chunked_loss
from qtrain.training import recompute_retry
from qtrain.training.module import LanguageModule
from qtrain.training.recompute import Recompute
from qtrain.training.recompute_retry import MicroBatch
from qtrain.training.trainer import trainer_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


class _Fails(torch.autograd.Function):
    """Raises in the forward or in the backward, as an allocation would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, when: Callable[[str], bool]) -> Tensor:
        ctx.when = when
        if when("forward"):
            raise torch.OutOfMemoryError("no more (made up)")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.when("backward"):
            raise torch.OutOfMemoryError("no more (made up)")
        return gradients[0], None


class Shortage(L.Callback):
    """Lets the first decoder layer fail in chosen passes; its backward comes last, when other gradients are there.

    Args:
        plan: (pass, number of that pass from 1) that fail.
    """

    def __init__(self, plan: set[tuple[str, int]]) -> None:
        self.plan, self.seen = plan, {"forward": 0, "backward": 0}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule) and pl_module.model is not None
        embedding = pl_module.method.plain_model(pl_module.model).get_input_embeddings()

        def fail(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            result: Tensor = _Fails.apply(output.requires_grad_(), self._count)  # type: ignore[no-untyped-call]
            return result

        embedding.register_forward_hook(fail)

    def _count(self, which: str) -> bool:
        self.seen[which] += 1
        return (which, self.seen[which]) in self.plan


def train(
    model: Path, run: Path, plan: set[tuple[str, int]], *extra: str
) -> tuple[dict[str, Tensor], LanguageModule, L.Trainer]:
    chats = run.with_suffix(".jsonl")
    lines = (
        f'{{"prompt": "count to {n}", "completion": "{" ".join(map(str, range(1 + 3 * n % 11)))}"}}' for n in range(16)
    )
    chats.write_text("\n".join(lines))
    config = load_recipe(
        None,
        *(f"model.path={model}", f"data.train={chats}", "data.max_length=64", "data.batch_size=2"),
        *("data.packing=false", "method.r=4", "method.base=none", "trainer.max_steps=3", "optimizer.lr=1e-2"),
        *("trainer.accumulate_grad_batches=2", "trainer.accelerator=cpu", f"run.dir={run}", *extra),
    )
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    L.seed_everything(3, verbose=False)
    arguments = trainer_arguments(config) | {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**arguments, callbacks=[Shortage(plan)])
    trainer.fit(module, datamodule=data)
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}, module, trainer


PLANS = {
    "forward of the first micro-batch": {("forward", 1)},
    "backward of the first": {("backward", 1)},
    "backward of the second, gradients of the first are there": {("backward", 2)},
    "forward of the second": {("forward", 2)},
    "twice in a row": {("backward", 2), ("backward", 3)},
    "in the second step": {("backward", 4)},
    "forward, then backward": {("forward", 2), ("backward", 2), ("forward", 5)},
}


@pytest.fixture(scope="module")
def undisturbed(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], LanguageModule, L.Trainer]:
    return train(tiny_llama_dir, tmp_path_factory.mktemp("undisturbed") / "run", set(), "method.lora_dropout=0.1")


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_the_weights_are_those_of_an_undisturbed_run(
    plan: set[tuple[str, int]],
    undisturbed: tuple[dict[str, Tensor], LanguageModule, L.Trainer],
    tiny_llama_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bit for bit, dropout included: each micro-batch begins from its own random state again."""
    expected, _, whole = undisturbed
    with caplog.at_level(logging.WARNING, logger="qtrain"):
        found, module, trainer = train(tiny_llama_dir, tmp_path / "b", plan, "method.lora_dropout=0.1")
    assert trainer.global_step == whole.global_step == 3
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert trainer.callback_metrics["train/loss"] == whole.callback_metrics["train/loss"]
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == len(plan)
    assert said[0] == "out of memory with recompute none: going on with selective, the first 1 of 2 layers"
    assert module.recompute is not None
    assert module.recompute.level == ("none", "selective", "full", "offload")[len(plan)]
    assert str(module.recompute).endswith(": what was above ran out of memory")


@pytest.mark.parametrize("plan", [{("forward", 1)}, {("backward", 1)}, {("backward", 2)}], ids=str)
def test_at_the_lowest_level_micro_batches_are_divided(
    plan: set[tuple[str, int]], tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same batches and the same mean over their tokens; sums are rounded in another order."""
    lowest = "run.recompute=offload"
    expected, _, whole = train(tiny_llama_dir, tmp_path / "a", set(), lowest)
    with caplog.at_level(logging.WARNING, logger="qtrain"):
        found, _, trainer = train(tiny_llama_dir, tmp_path / "b", plan, lowest)
    assert trainer.global_step == 3
    for name in expected:
        assert torch.allclose(expected[name], found[name], rtol=1e-3, atol=2e-5), name
    assert torch.allclose(trainer.callback_metrics["train/loss"], whole.callback_metrics["train/loss"])
    assert [r.message for r in caplog.records if "out of memory" in r.message] == [
        "out of memory with recompute offload: going on with offload, micro-batches in 2 parts"
    ]


def test_nothing_left_is_an_error(tiny_llama_dir: Path, tmp_path: Path) -> None:
    always = {("backward", n) for n in range(1, 99)}
    with pytest.raises(ModelError, match=r"(?s)offload, micro-batches in 2 parts: no more.*data.max_length"):
        train(tiny_llama_dir, tmp_path / "a", always)


def test_late_shortages_are_raised(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_retry, "FIRST_STEPS", 1)
    for which in ("forward", "backward"):
        with pytest.raises(torch.OutOfMemoryError, match="made up"):
            train(tiny_llama_dir, tmp_path / which, {(which, 3)})


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    ("level", "way_out"),
    [
        ("none", "run.recompute=full, or a smaller data.batch_size"),
        ("selective", "run.recompute=full, or a smaller data.batch_size"),
        ("full", "run.recompute=offload, or a smaller data.batch_size"),
        ("offload", "a smaller data.batch_size"),
    ],
)
def test_one_process_of_several_says_the_way_out(
    level: str, way_out: str, which: str, tiny_llama: LlamaForCausalLM
) -> None:
    recompute = Recompute(tiny_llama)
    recompute.set(level)

    def loss(batch: Any) -> Tensor:
        y = torch.ones(3, requires_grad=True).exp().sum()
        result: Tensor = _Fails.apply(y, lambda when: when == which)  # type: ignore[no-untyped-call]
        return result

    window = recompute_retry.AccumulationWindow(loss, recompute, list, torch.enable_grad, lambda: 1, alone=False)
    labels = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": labels, "labels": labels, "loss_tokens": torch.tensor(4)}
    with pytest.raises(ModelError, match=r"no more \(made up\)") as caught:
        window.backward(window.forward(batch) / 1)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert f"recompute {level}" in caught.value.what and str(caught.value.fix).startswith(way_out)
    assert recompute.level == level  # the others would not go down with it


class Held:
    """What a graph keeps in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would hold its own graph


def test_the_failed_pass_is_let_go_before_the_next(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Lightning still holds the loss of the failed pass: what its graph kept must not be there in the second."""
    config = load_recipe(None, f"model.path={tiny_llama_dir}", "method.base=none", "trainer.accelerator=cpu")
    module = LanguageModule(config)
    module.build(torch.device("cpu"))
    kept: list[weakref.ref[Held]] = []
    alive: list[int] = []

    def keep(tensor: Tensor) -> Held:
        kept.append(weakref.ref(held := Held(tensor)))
        return held

    def loss(batch: Any) -> Tensor:
        alive.append(sum(one() is not None for one in kept))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
            y = torch.ones(9, requires_grad=True).exp().sum()
        result: Tensor = _Fails.apply(y, lambda which: which == "backward" and len(alive) == 1)  # type: ignore[no-untyped-call]
        return result

    assert module.recompute is not None
    window = recompute_retry.AccumulationWindow(loss, module.recompute, list, torch.enable_grad, lambda: 1)
    labels = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": labels, "labels": labels, "loss_tokens": torch.tensor(4)}
    scaled = window.forward(batch) / 1
    assert [one() is not None for one in kept] == [True]
    window.backward(scaled)
    assert alive == [0, 0] and window.close()[1] == 4


def test_what_a_failed_forward_left_for_other_layers_is_let_go(tiny_llama: LlamaForCausalLM) -> None:
    """Outputs of a block that nobody took, and the levels of the last input: both hold the graph up to them."""
    block, model = SharedOutputs(), tiny_llama.train()
    layer = QuantLinear.from_linear(nn.Linear(9, 9), WeightSection(), QuantizerSection(format="int8"))
    memory: list[StorageWeakRef] = []
    alive: list[int] = []

    def loss(batch: Any) -> Tensor:
        alive.append(sum(not one.expired() for one in memory))
        hidden = torch.ones(4, 9, requires_grad=True).exp()
        pair = hidden.sin(), hidden.cos()
        taken = block.take(0, hidden, lambda x: pair)
        assert taken is not None
        y = layer(taken)
        memory.extend(StorageWeakRef(one.untyped_storage()) for one in (hidden, *pair))
        if len(alive) == 1:
            raise torch.OutOfMemoryError("no more (made up)")
        return y.sum()

    window = recompute_retry.AccumulationWindow(loss, Recompute(model), list, torch.enable_grad, lambda: 1)
    labels = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": labels, "labels": labels, "loss_tokens": torch.tensor(4)}
    window.backward(window.forward(batch) / 1)
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("plan", "parts"),
    [(set(), 1), ({("forward", 1)}, 2), ({("backward", 1)}, 2), ({("backward", 1), ("backward", 3)}, 4)],
    ids=["whole", "forward-2", "backward-2", "backwards-4"],  # a set's own words come in any order
)
def test_gradients_of_one_micro_batch_are_those_of_the_mean(
    plan: set[tuple[str, int]], parts: int, tiny_llama: LlamaForCausalLM
) -> None:
    """Over the tokens of all of it, also where its parts have 21, 6, 0 and 2 of them."""
    model, recompute = tiny_llama.train(), Recompute(tiny_llama)
    ids = torch.randint(0, 512, (4, 22), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, kept in enumerate((22, 7, 0, 3)):
        labels[row, kept:] = -100
    batch = {"input_ids": ids, "labels": labels, "loss_tokens": torch.tensor(29)}
    trained = list(model.parameters())
    summed = chunked_loss(model, batch)
    expected = torch.autograd.grad(summed, trained)
    seen = {"forward": 0, "backward": 0}

    def due(which: str) -> bool:
        seen[which] += 1
        return (which, seen[which]) in plan

    def loss(batch: Any) -> Tensor:
        result: Tensor = _Fails.apply(chunked_loss(model, batch), due)  # type: ignore[no-untyped-call]
        return result

    recompute.set("offload")  # from there on micro-batches are divided

    def window(scale: int, *, alone: bool = True) -> recompute_retry.AccumulationWindow:
        return recompute_retry.AccumulationWindow(
            loss, recompute, model.parameters, torch.enable_grad, lambda: scale, alone=alone
        )

    means = window(1)
    means.backward(means.forward(batch) / 1)
    assert means.means and means._parts == parts
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 29, rtol=1e-4, atol=1e-7)
    # What is logged stays the sum.
    torch.testing.assert_close(means.close(), torch.stack((summed.detach().double(), torch.tensor(29.0).double())))

    for other in (window(2), window(1, alone=False)):
        model.zero_grad()
        scale = other._scale()
        other.backward(other.forward(batch) / scale)
        assert not other.means
        for parameter, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("plan", "parts"), [({("forward", 1)}, 2), ({("backward", 1), ("backward", 2)}, 4)], ids=str)
@pytest.mark.parametrize("scale", [1, 2])
def test_the_last_micro_batch_of_an_epoch_has_fewer_rows_than_parts(
    scale: int, plan: set[tuple[str, int]], parts: int, tiny_llama: LlamaForCausalLM
) -> None:
    """The first of four rows had to be divided; then comes one of one row, in a window of its own or in the same."""
    model, recompute = tiny_llama.train(), Recompute(tiny_llama)
    ids = torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": rows, "labels": rows, "loss_tokens": torch.tensor(len(rows) * 11)} for rows in (ids[:4], ids[4:])
    ]
    seen = {"forward": 0, "backward": 0}

    def due(which: str) -> bool:
        seen[which] += 1
        return (which, seen[which]) in plan

    def loss(batch: Any) -> Tensor:
        result: Tensor = _Fails.apply(chunked_loss(model, batch), due)  # type: ignore[no-untyped-call]
        return result

    trained = list(model.parameters())
    alone = [torch.autograd.grad(chunked_loss(model, batch), trained) for batch in batches]
    recompute.set("offload")  # from there on micro-batches are divided
    window = recompute_retry.AccumulationWindow(loss, recompute, model.parameters, torch.enable_grad, lambda: scale)
    for number, batch in enumerate(batches):
        window.backward(window.forward(batch) / scale)
        assert window._parts == parts
        if scale == 1:
            tokens = int(batch["loss_tokens"])
            assert window.close()[1] == tokens
            for parameter, gradient in zip(trained, alone[number], strict=True):
                torch.testing.assert_close(parameter.grad, gradient / tokens, rtol=1e-4, atol=1e-7)
            model.zero_grad()
    if scale == 2:
        assert window.close()[1] == 55
        for parameter, one, other in zip(trained, *alone, strict=True):
            torch.testing.assert_close(parameter.grad, (one + other) / 2, rtol=1e-4, atol=1e-5)


def test_a_shortage_in_a_small_micro_batch_divides_the_larger_ones(tiny_llama: LlamaForCausalLM) -> None:
    """A window of two rows and one: when its second backward fails, all of it is run again, the first divided."""
    model, recompute = tiny_llama.train(), Recompute(tiny_llama)
    ids = torch.randint(0, 512, (3, 12), generator=torch.Generator().manual_seed(0))
    rows: list[int] = []

    def loss(batch: Any) -> Tensor:
        rows.append(len(batch["input_ids"]))
        fails = len(rows) == 2
        result: Tensor = _Fails.apply(chunked_loss(model, batch), lambda which: which == "backward" and fails)  # type: ignore[no-untyped-call]
        return result

    recompute.set("offload")
    window = recompute_retry.AccumulationWindow(loss, recompute, model.parameters, torch.enable_grad, lambda: 2)
    for part in (ids[:2], ids[2:]):
        batch = {"input_ids": part, "labels": part, "loss_tokens": torch.tensor(len(part) * 11)}
        window.backward(window.forward(batch) / 2)
    assert rows == [2, 1, 1, 1, 1] and window.close()[1] == 33


def test_a_micro_batch_without_tokens_has_gradients_of_zero(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.train()
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100), "loss_tokens": torch.tensor(0)}
    loss = partial(chunked_loss, model)
    window = recompute_retry.AccumulationWindow(loss, Recompute(model), model.parameters, torch.enable_grad, lambda: 1)
    window.backward(window.forward(batch) / 1)
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found and all(bool((gradient == 0).all()) for gradient in found)


@pytest.mark.gpu
def test_a_gpu_that_runs_out_for_real() -> None:
    """Four layers of some 0.5 GiB each in 1.5 GiB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).cuda().train()
    labels = torch.randint(0, 256, (64, 512), device="cuda")
    batch = {"input_ids": labels, "labels": labels, "loss_tokens": torch.tensor(64 * 511)}

    def gradients(recompute: Recompute) -> list[Tensor]:
        loss = partial(chunked_loss, model)
        window = recompute_retry.AccumulationWindow(loss, recompute, model.parameters, torch.enable_grad, lambda: 1)
        model.zero_grad()
        window.backward(window.forward(batch) / 1)
        assert window.close()[1] == 64 * 511
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    recompute = Recompute(model)
    recompute.set("full")
    expected = gradients(recompute)
    recompute.set("none")
    model.zero_grad()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total)
    try:
        found = gradients(recompute)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert recompute.level != "none"
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in zip(expected, found, strict=True))


def test_parts_of_a_micro_batch() -> None:
    labels = torch.tensor([[1, 2, -100], [1, -100, 3], [1, 2, 3], [-100, -100, -100], [1, 1, 1]])
    batch = {"input_ids": labels, "labels": labels, "tokens": torch.tensor(9), "loss_tokens": torch.tensor(6)}
    parts = MicroBatch.of(batch).parts(2)
    assert torch.equal(torch.cat([part["labels"] for part in parts]), labels)
    assert [len(part["labels"]) for part in parts] == [3, 2]
    assert [int(part["loss_tokens"]) for part in parts] == [4, 2] and int(parts[0]["tokens"]) == 9
    assert MicroBatch.of(batch).parts(1)[0] is batch
    assert [len(part["labels"]) for part in MicroBatch.of(batch).parts(8)] == [1] * 5
