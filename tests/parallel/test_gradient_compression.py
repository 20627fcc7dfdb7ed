"""Gradients sent in fewer bytes: within a quantization step of the average, and training that goes the same way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

KINDS = ("bf16", "int8_tensor", "int8_channel")
PROGRAM = """
import json, sys, torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from qtrain.callbacks.gradient_compression import compress

distributed.init_process_group("gloo")
rank, found = distributed.get_rank(), {}
for kind in ("bf16", "int8_tensor", "int8_channel"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))
    plain = nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))
    plain.load_state_dict(net.state_dict())
    model = DistributedDataParallel(net)
    compress(model, kind)
    worst, sums = 0.0, [[torch.zeros_like(p), torch.zeros_like(p)] for p in net.parameters()]
    torch.manual_seed(rank)
    x = torch.randn(8, 33)
    for step in range(40):
        net.zero_grad(), plain.zero_grad()
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
        for p, q, sum_ in zip(net.parameters(), plain.parameters(), sums):
            rows = q.grad.reshape(len(q) if kind == "int8_channel" and q.ndim > 1 else 1, -1)
            half = rows.abs().amax(1, keepdim=True) / 127 / 2
            half = 2**-8 * q.grad.abs() if kind == "bf16" else half.expand_as(rows).reshape(q.shape)
            exact, half = q.grad.clone(), half.clone()
            distributed.all_reduce(exact), distributed.all_reduce(half)
            if step == 0:  # each process is off by half a step; bf16 is rounded once more, after the sum
                allowed = half / 2 * (2 if kind == "bf16" else 1) + 2**-7 * exact.abs() * (kind == "bf16") + 1e-7
                worst = max(worst, float(((p.grad - exact / 2).abs() / allowed).max()))
            sum_[0] += p.grad
            sum_[1] += exact / 2
    drift = max(float((a - b).abs().max() / b.abs().max()) for a, b in sums)
    found[kind] = {"worst": worst, "drift": drift}
if rank == 0:
    print("FOUND" + json.dumps(found), flush=True)
distributed.barrier()
del model, net  # its buckets hold futures of the group
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    program = tmp_path_factory.mktemp("averages") / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    found: dict[str, dict[str, float]] = json.loads(line.removeprefix("FOUND"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_within_the_quantization_step(averages: dict[str, dict[str, float]], kind: str) -> None:
    assert 1e-3 < averages[kind]["worst"] <= 1


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_was_left_out_is_made_up_for(averages: dict[str, dict[str, float]], kind: str) -> None:
    """The sum over 40 steps is off by what one step owes, not by 40 times that."""
    assert averages[kind]["drift"] < 1 / 127 / 40 * 2


@pytest.mark.slow
def test_training_goes_the_same_way(
    words: Callable[..., tuple[str, ...]],
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    losses: Callable[[Path], list[float]],
    methods: dict[str, tuple[str, ...]],
    tmp_path: Path,
) -> None:
    kinds = ("none", *KINDS)
    # At the rate of the other tests the first steps of Adam follow signs, which rounding turns where they mean nothing.
    more = (*methods["lora"], "optimizer.lr=2e-3")
    done = torchrun(*(words(tmp_path / kind, *more, f"run.gradient_compression={kind}") for kind in kinds))
    assert done.returncode == 0, done.stderr[-4000:]
    exact = losses(tmp_path / "none")
    for kind in KINDS:
        found = losses(tmp_path / kind)
        assert found != exact
        assert found == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_without_ddp_there_is_nothing_to_compress(
    words: Callable[..., tuple[str, ...]], methods: dict[str, tuple[str, ...]], tmp_path: Path, strategy: str
) -> None:
    more = ("run.gradient_compression=bf16", f"trainer.strategy={strategy}", "trainer.devices=1")
    config = load_recipe(None, *words(tmp_path / "run", *methods["lora"], *more))
    with pytest.raises(ConfigError, match="compresses what DDP sends"):
        fit(config, RunDirectory.of(config))
    assert not (tmp_path / "run").exists()
