"""Memory of a process that holds a share of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtrain.config.compose import load_recipe
from qtrain.config.schema import Config
from qtrain.training.plan import plan
from qtrain.training.plan.estimate import Estimator
from qtrain.training.plan.sharded import Weights, shared_out
from qtrain.training.plan.step_memory import KindBytes, StepMemory
from qtrain.training.recompute_budget import LayerBytes, probe_batch

LAYER = LayerBytes(input=1, saved=10, working=50, shared=0)
MEMORY = StepMemory(
    base=1000,
    trained=400,
    gradients=400,
    optimizer=800,
    update=40,
    inputs=3,
    teacher=0,
    workspace=5,
    entry=2,
    head=30,
    kinds=[KindBytes(4, LAYER, 60)],
    accumulates=False,
)


def test_shares_and_what_is_whole_beside_them() -> None:
    """4 layers of 150 frozen and 60 trained bytes, 200 and 160 around them; 200 of the base are no parameters."""
    whole, layers = Weights(frozen=800, trained=400), [(4, Weights(150, 60))]
    found = shared_out(MEMORY, whole, layers, 2)
    assert found == replace(
        MEMORY,
        base=200 + 400 + 200 + 2 * 150,
        trained=200 + 160 + 2 * 60,
        gradients=200,
        optimizer=400,
        update=20,
        copies=160 + 60,
        kinds=[KindBytes(4, LAYER, 30)],
    )


@pytest.mark.parametrize(
    ("words", "processes", "level"),
    [
        ((), 1, "offload"),
        ((), 2, "offload"),
        (("trainer.strategy=fsdp2",), 1, "offload"),
        (("trainer.strategy=fsdp2",), 2, "none"),
        (("method.name=qat", "run.cuda_graphs=true"), 1, "none"),
        (("trainer.strategy=fsdp2", "run.recompute=full"), 2, "full"),
    ],
)
def test_the_plan_has_the_level_that_the_run_will_have(words: tuple[str, ...], processes: int, level: str) -> None:
    """Of a GPU on which nothing fits."""
    config, memory = load_recipe(None, *words), replace(MEMORY, on_gpu=True)
    assert isinstance(config, Config)
    assert plan._level(config, memory, 1, processes)[0] == level
    assert plan._level(config, replace(memory, on_gpu=False), 1, 1)[0] == ("full" if level == "full" else "none")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("words", [("method.base=nf4",), ("method.name=qat", "method.weight.format=int8")], ids=str)
def test_a_process_of_many_holds_less_than_one_of_two(words: tuple[str, ...], tiny_llama_dir: Path) -> None:
    def held(processes: int, *more: str) -> StepMemory:
        config = load_recipe(None, f"model.path={tiny_llama_dir}", *words, *more)
        assert isinstance(config, Config)
        batch = probe_batch(2, 16, 2, packing=False, device=torch.device("cpu"))
        batch = dict(batch) | {"labels": batch["input_ids"]}
        estimator = Estimator(config, torch.device("cpu"), processes)
        return estimator.step(batch, config.optimizer, accumulates=False)

    one, two, eight = held(1, "trainer.strategy=fsdp2"), *(held(n, "trainer.strategy=fsdp2") for n in (2, 8))
    assert one == held(1)
    assert eight.optimizer < two.optimizer < one.optimizer == held(2).optimizer
    assert eight.gradients < two.gradients < one.gradients and eight.base <= two.base
    assert (two.optimizer, two.gradients) == (one.optimizer // 2, one.gradients // 2)
    assert eight.at("full").total < two.at("full").total < held(2).at("full").total
