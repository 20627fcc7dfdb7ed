"""Training with blocks of adapters: the run says so, gives what it gives without, and goes on to the bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtrain.config.compose import load_recipe
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = (
        f'{{"messages": [{{"role": "user", "content": "what is {n}"}}, '
        f'{{"role": "assistant", "content": "it is {n}"}}]}}'
        for n in range(12)
    )
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def train(model: Path, chats: Path, run: Path, *more: str) -> Path:
    data = (f"model.path={model}", f"data.train={chats}", "data.max_length=48", "data.batch_size=2")
    method = ("method.r=4", "optimizer.name=adamw", "optimizer.lr=1e-2", "trainer.accelerator=cpu", f"run.dir={run}")
    config = load_recipe(None, *data, *method, *more)
    fit(config, RunDirectory.of(config))
    return run


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return found


def test_a_run_says_what_is_fused_and_learns_as_without(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        asked: train(tiny_llama_dir, chats, tmp_path / asked, "trainer.max_steps=6", f"method.fused_blocks={asked}")
        for asked in ("auto", "none")
    }
    printed = capsys.readouterr()
    by = "bitsandbytes (the kernel in Triton needs a GPU)"
    words = f"QKV, O and MLP fused over nf4 (2 layers), dequantized by {by}, SwiGLU plain"
    assert "QKV, O and MLP fused over nf4 (2 layers)" in " ".join((printed.out + printed.err).split())
    assert json.loads((runs["auto"] / "fit.json").read_text())["blocks"] == words
    assert "fused_blocks=none" in json.loads((runs["none"] / "fit.json").read_text())["blocks"]
    assert losses(runs["auto"]) == pytest.approx(losses(runs["none"]), rel=1e-5)
    found, wanted = adapter(runs["auto"]), adapter(runs["none"])
    assert found.keys() == wanted.keys() and len(found) == 28
    assert all((found[name] - own).norm() <= 1e-2 * own.norm() for name, own in wanted.items())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_run_with_dropout_goes_on_to_the_bit(
    recompute: str, tiny_llama_dir: Path, chats: Path, tmp_path: Path
) -> None:
    more = ("method.lora_dropout=0.2", f"run.recompute={recompute}")
    straight = train(tiny_llama_dir, chats, tmp_path / "straight", "trainer.max_steps=8", *more)
    broken = tmp_path / "broken"
    train(tiny_llama_dir, chats, broken, "trainer.max_steps=4", *more)
    train(tiny_llama_dir, chats, broken, "trainer.max_steps=8", "run.resume=true", *more)
    found, wanted = adapter(broken), adapter(straight)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert losses(broken)[-4:] == losses(straight)[-4:]


def test_a_run_in_fp8_says_so_and_learns(tiny_llama_dir: Path, chats: Path, tmp_path: Path) -> None:
    keys = ("trainer.max_steps=6", "optimizer.lr=1e-3")
    run = train(tiny_llama_dir, chats, tmp_path / "fp8", *keys, "method.compute_dtype=fp8")
    exact = train(tiny_llama_dir, chats, tmp_path / "exact", *keys)
    assert "14 frozen weights as e4m3 rows" in json.loads((run / "fit.json").read_text())["blocks"]
    assert losses(run) != losses(exact) and losses(run) == pytest.approx(losses(exact), rel=0.01)
