"""A run that is cut off and goes on ends where an undisturbed one does, to the bit."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.config.compose import load_recipe
from qtrain.errors import CheckpointError, QtrainError
from qtrain.training.fit import fit
from qtrain.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
    pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader"),
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = (
        f'{{"messages": [{{"role": "user", "content": "what is {n}"}}, '
        f'{{"role": "assistant", "content": "it is {"one and " * (n % 5)}{n}"}}]}}'
        for n in range(22)
    )
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def settings(model: Path, chats: Path, run: Path, *more: str) -> tuple[str, ...]:
    return (
        *(
            f"model.path={model}",
            f"data.train={chats}",
            "data.max_length=64",
            "data.batch_size=2",
            "data.packing=false",
        ),
        *("method.r=4", "method.lora_dropout=0.2", "method.neftune_alpha=5", "optimizer.lr=1e-2"),
        *("trainer.accumulate_grad_batches=2", "trainer.accelerator=cpu", f"run.dir={run}", *more),
    )


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def train(*words: str) -> None:
    config = load_recipe(None, *words)
    fit(config, RunDirectory.of(config))


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("save_every", [0, 5])
def test_ten_steps_and_ten_more_are_twenty(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path, optimizer: str, save_every: int
) -> None:
    # 22 samples are 11 micro-batches, 6 windows, the last of them of one: step 10 lies within the second epoch.
    more = (f"optimizer.name={optimizer}", f"run.save_every={save_every}")
    straight = settings(tiny_llama_dir, chats, tmp_path / "straight", *more)
    train(*straight, "trainer.max_steps=20", "trainer.max_epochs=-1")
    halves = settings(tiny_llama_dir, chats, tmp_path / "halves", *more)
    train(*halves, "trainer.max_steps=10", "trainer.max_epochs=-1")
    half = load_file(tmp_path / "halves" / "adapter" / "adapter_model.safetensors")
    train(*halves, "trainer.max_steps=20", "trainer.max_epochs=-1", "run.resume=true")
    first, second = tmp_path / "straight", tmp_path / "halves"
    assert len(losses(first)) == 20
    assert losses(first) == losses(second)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], half[name]) for name in one)


def test_a_checkpoint_holds_what_trains_as_plain_data(tiny_llama_dir: Path, chats: Path, tmp_path: Path) -> None:
    words = settings(tiny_llama_dir, chats, tmp_path / "run")
    train(*words, "trainer.max_steps=3")
    path = RunDirectory(tmp_path / "run").newest_checkpoint()
    assert path is not None
    content = read_checkpoint(str(path))  # weights_only=True
    assert content["state_dict"]
    assert all(".lora_" in name for name in content["state_dict"])
    base = (tiny_llama_dir / "model.safetensors").stat().st_size
    assert sum(value.numel() for value in content["state_dict"].values()) * 4 < base / 4


def test_another_base_is_refused(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path, tiny_llama: torch.nn.Module
) -> None:
    words = settings(tiny_llama_dir, chats, tmp_path / "run")
    train(*words, "trainer.max_steps=2")
    other = tmp_path / "other"
    with torch.no_grad():
        next(tiny_llama.parameters()).add_(1.0)
    tiny_llama.save_pretrained(other)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((tiny_llama_dir / name).read_bytes())
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(CheckpointError, match="another base"):
        train(*words, f"model.path={other}", "trainer.max_steps=4", "run.resume=true")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").iterdir()}


def test_a_damaged_checkpoint_is_refused(tiny_llama_dir: Path, chats: Path, tmp_path: Path) -> None:
    words = settings(tiny_llama_dir, chats, tmp_path / "run")
    train(*words, "trainer.max_steps=2")
    path = RunDirectory(tmp_path / "run").newest_checkpoint()
    assert path is not None
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"2,000 bytes, .* were written"):
        train(*words, "trainer.max_steps=4", "run.resume=true")


def test_a_finished_run_has_nothing_to_do(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(tiny_llama_dir, chats, tmp_path / "run")
    train(*words, "trainer.max_steps=2")
    figures = (tmp_path / "run" / "fit.json").read_bytes()
    train(*words, "trainer.max_steps=2", "run.resume=true")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "fit.json").read_bytes() == figures


def test_an_earlier_run_stays_until_model_and_data_are_known_to_be_good(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(*settings(tiny_llama_dir, chats, run), "trainer.max_steps=2")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(QtrainError, match="nowhere"):
        train(*settings(tiny_llama_dir, chats, run), "run.overwrite=true", "method.target_modules=[nowhere]")
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
