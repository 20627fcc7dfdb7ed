"""FSDP2 over gloo: shares of the weights train what whole ones train, and every file is that of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.slow,  # one of its runs holds two processes for a minute; DDP has the same checks in CI
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
]
NAMES = ("qlora", "lora", "qat", "bytes", "peqa")
ARTIFACTS = {name: "adapter/adapter_model" for name in ("qlora", "lora")} | {
    name: "weights/model" for name in ("qat", "bytes")
}
SHARDED = "trainer.strategy=fsdp2"
MORE = {"qlora": ("run.recompute=full",)}


@pytest.fixture(scope="module")
def runs(
    words: Callable[..., tuple[str, ...]],
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    alone: Callable[..., None],
    methods: dict[str, tuple[str, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Runs by name: NAME of two processes, NAME_alone of one; qat_out and qat_in began or ended sharded."""
    path = tmp_path_factory.mktemp("runs")
    half, saved = "trainer.max_steps=4", "run.save_every=4"
    for name in NAMES:
        alone(*words(path / f"{name}_alone", *methods[name], saved))
    alone(*words(path / "qat_in", *methods["qat"], half))
    resumed = ("run.resume=true", "trainer.accumulate_grad_batches=1")
    done = torchrun(
        *(words(path / name, *methods[name], SHARDED, saved, *MORE.get(name, ())) for name in NAMES),
        words(path / "qat_out", *methods["qat"], SHARDED, half),
        words(path / "qat_in", *methods["qat"], SHARDED, *resumed),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone(*words(path / "qat_out", *methods["qat"], "run.resume=true", "trainer.strategy=auto"))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_of_one_process(runs: Path, losses: Callable[[Path], list[float]], name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / f"{name}_alone"), abs=1e-5)
    two, one = (json.loads((runs / run / "fit.json").read_text()) for run in (name, f"{name}_alone"))
    assert two["val_loss_after"] == pytest.approx(one["val_loss_after"], abs=2e-4)
    assert two["trained_parameters"] == one["trained_parameters"]
    assert two["blocks"] == one["blocks"]


@pytest.mark.parametrize("name", NAMES)
def test_the_artifact_is_whole(runs: Path, name: str) -> None:
    artifact = ARTIFACTS.get(name, "scales/scales") + ".safetensors"
    mine, theirs = (load_file(runs / run / artifact) for run in (name, f"{name}_alone"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in theirs.items():
        assert (mine[key].float() - value.float()).abs().mean() < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_that_of_one_process(runs: Path, name: str) -> None:
    mine, theirs = (
        read_checkpoint(str(RunDirectory(runs / run).newest_checkpoint())) for run in (name, f"{name}_alone")
    )
    assert {k: v.shape for k, v in mine["state_dict"].items()} == {k: v.shape for k, v in theirs["state_dict"].items()}
    mine, theirs = (content["optimizer_states"][0]["state"] for content in (mine, theirs))
    assert mine.keys() == theirs.keys()
    for number, moments in theirs.items():
        assert (mine[number]["exp_avg"] - moments["exp_avg"]).abs().mean() < 1e-4 * (
            1 + moments["exp_avg"].abs().mean()
        )


@pytest.mark.parametrize("name", ["qat_in", "qat_out"])
def test_a_run_goes_on_sharded_or_no_longer_so(runs: Path, losses: Callable[[Path], list[float]], name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / "qat_alone"), abs=1e-5)


SHARES = """
import sys, torch, zlib
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
import qtrain
from qtrain.modules.token_loss import chunked_loss
from qtrain.training.processes import checksum
from qtrain.training.sharding import as_forward, shard, unshard, whole

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
weight = {"format": "int4", "group_size": 32}
options = {"qlora": {"r": 4}, "peqa": {"weight": weight, "init": "hqq"}, "qat": {"weight": weight}}
for method, more in options.items():
    torch.manual_seed(0)
    model = qtrain.prepare(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), method, **more)
    plain = model.get_base_model() if method == "qlora" else model
    before = {name: checksum(value) for name, value in model.named_parameters()}
    ids = torch.arange(2, 30)[None] + distributed.get_rank()
    batch = {"input_ids": ids, "labels": ids}
    expected = chunked_loss(plain, batch).detach()
    shard(plain, [part for part in plain.modules() if isinstance(part, GradientCheckpointingLayer)], mesh)
    held = sum(value.to_local().nbytes for value in model.parameters())
    assert all((whole(value) is None) == (distributed.get_rank() > 0) for value in model.parameters()), method
    loss = as_forward(plain, "loss_of", lambda batch: chunked_loss(plain, batch))(batch)
    assert torch.equal(loss, expected), (method, float(loss), float(expected))
    loss.backward()
    unshard(model)
    after = {name: checksum(value) for name, value in model.named_parameters()}
    assert before == after, method
    total = sum(value.nbytes for value in model.parameters())
    assert held < 0.51 * total, (held, total)
    print("SAME", method, len(after), flush=True)
distributed.destroy_process_group()
"""


def test_shares_together_are_the_bytes_that_there_were(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Codes of NF4 and packed integers by checksum, before the shares were taken and after they were put together."""
    (tmp_path / "program.py").write_text(SHARES)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tiny_llama_dir)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("SAME") == 6
