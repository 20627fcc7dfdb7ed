"""What is watched, when a graph serves a call; on a GPU, that replayed steps are the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.methods.method import build_method
from qtrain.modules.schedule import QuantizationSchedule
from qtrain.training.cuda_graphs import LayerGraphs
from qtrain.training.strategies import check_served


def same(slots: tuple[nn.Module, ...], samples: tuple[tuple[Tensor, ...], ...]) -> Sequence[Callable[..., Any]]:
    """In place of a capture, the layers themselves, run once on the samples as a capture would."""
    for slot, sample in zip(slots, samples, strict=True):
        slot(*sample)
    return list(slots)


def ids(rows: int = 2, length: int = 8) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 100


def graphs_of(model: LlamaForCausalLM) -> LayerGraphs:
    graphs = LayerGraphs(same)
    graphs.capture([model], lambda: model(input_ids=ids(), use_cache=False), "cpu")
    return graphs


def test_calls_of_the_captured_kind_are_replayed_and_give_the_same(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.train()
    expected = model(input_ids=ids() + 1, use_cache=False).logits
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    graphs = graphs_of(model)
    found = model(input_ids=ids() + 1, use_cache=False).logits
    found.sum().backward()
    assert graphs.calls == [graphs.count, 0]
    assert graphs.count == model.config.num_hidden_layers
    assert torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("other", ["rows", "length", "evaluation", "no gradient", "cache"])
def test_calls_of_another_kind_run_the_layer(tiny_llama: LlamaForCausalLM, other: str) -> None:
    model = tiny_llama.train()
    graphs = graphs_of(model)
    inputs = ids(3 if other == "rows" else 2, 9 if other == "length" else 8)
    if other == "evaluation":
        model.eval()
    with torch.set_grad_enabled(other != "no gradient"):
        model(input_ids=inputs, use_cache=other == "cache")
    assert graphs.calls == [0, graphs.count]


def test_a_teacher_without_gradients_is_replayed_in_evaluation_mode(
    tiny_llama: LlamaForCausalLM, tiny_llama_dir: Any
) -> None:
    student = tiny_llama.train()
    teacher = LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval().requires_grad_(False)

    def both() -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=ids(), use_cache=False).logits
        return (student(input_ids=ids(), use_cache=False).logits - target).pow(2).sum()

    graphs = LayerGraphs(same)
    graphs.capture([student, teacher], both, "cpu")
    both().backward()
    assert graphs.calls == [2 * student.config.num_hidden_layers, 0]
    assert all(p.grad is None for p in teacher.parameters())


def test_released_layers_are_as_they_were(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.train()
    names = list(model.state_dict())
    graphs = graphs_of(model)
    assert list(model.state_dict()) == names
    graphs.release()
    assert graphs.count == 0
    model(input_ids=ids(), use_cache=False)
    assert graphs.calls == [0, 0]
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_capture_that_fails_leaves_the_layers_and_says_why(tiny_llama: LlamaForCausalLM) -> None:
    def failing(*_: object) -> Sequence[Callable[..., Any]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = LayerGraphs(failing)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture([tiny_llama], lambda: tiny_llama(input_ids=ids(), use_cache=False), "cpu")
    assert all("forward" not in vars(module) for module in tiny_llama.modules())


def test_a_cpu_has_none(tiny_llama: LlamaForCausalLM) -> None:
    graphs = LayerGraphs()
    graphs.try_to_capture([tiny_llama], lambda: None, torch.device("cpu"))
    assert str(graphs) == "none: cpu has none"


def test_a_layer_that_runs_twice_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(RuntimeError, match="more than once"):
        LayerGraphs(same).capture(
            [tiny_llama], lambda: [tiny_llama(input_ids=ids(), use_cache=False) for _ in range(2)], "cpu"
        )


@pytest.mark.parametrize(
    "keys, what",
    [
        (["method.name=qlora"], "method.name=qlora"),
        (["method.name=qat", "method.lora={r: 4}"], "method.lora"),
        (["method.name=qat", "method.start_step=5"], "quantization that moves"),
        (["method.name=qat", "run.recompute=full"], "run.recompute=full"),
    ],
)
def test_what_a_graph_would_train_wrongly_is_refused(keys: list[str], what: str) -> None:
    config = load_recipe(None, "model.path=m", "data.train=t.txt", "run.cuda_graphs=true", *keys)
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    schedule = getattr(build_method(config.method), "schedule", QuantizationSchedule(0, None, {}))
    with pytest.raises(ConfigError, match=f"run.cuda_graphs=true: CUDA graphs of layers with {what}"):
        check_served(trainer, config, schedule)


def test_the_level_that_is_left_to_the_run_is_none_beside_graphs() -> None:
    config = load_recipe(None, "model.path=m", "data.train=t.txt", "run.cuda_graphs=true", "method.name=qat")
    assert config.run.recompute == "auto"
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    check_served(trainer, config, QuantizationSchedule(0, None, {}))


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_training_is_the_training(tiny_llama: LlamaForCausalLM, accumulate: int) -> None:
    first = tiny_llama.cuda().train()
    second = LlamaForCausalLM(first.config).cuda().train()
    second.load_state_dict(first.state_dict())
    graphs = LayerGraphs()
    batches = [(ids() + k).cuda() % 100 for k in range(6)]
    graphs.capture([second], lambda: second(input_ids=batches[0], use_cache=False))
    if accumulate > 1:
        for parameter in second.parameters():
            parameter.register_hook(torch.clone)
    losses = []
    for model in (first, second):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for k, batch in enumerate(batches):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            losses[-1].append(float(loss.detach()))
            if (k + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert graphs.calls == [len(batches) * graphs.count, 0]
    graphs.release()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
