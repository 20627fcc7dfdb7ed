"""What can happen to a training: signals, a full disk, damaged checkpoints, a file that goes, a weight that breaks."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.callbacks import checkpoint_files
from qtrain.callbacks.checkpoint_files import best_checkpoint, checkpoints
from qtrain.callbacks.throughput import Throughput
from qtrain.cli import main
from qtrain.training.module import LanguageModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it is resumed from
]

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    lines = (json.dumps({"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))}) for n in range(3, 23))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def command(tiny_llama_dir: Path, text: Path) -> Callable[..., list[str]]:
    def words(run: Path, *more: str) -> list[str]:
        """Ten micro-batches an epoch, so that a step of two lies within one; a validation every third step."""
        return [
            *("fit", f"model.path={tiny_llama_dir}", f"data.train={text}", f"data.validation={text}"),
            *("data.max_length=64", "data.batch_size=2", "data.packing=false", "method.base=none", "method.r=4"),
            *("method.lora_dropout=0.2", "optimizer.lr=1e-2", f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1"),
            *("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6", "trainer.limit_val_batches=1"),
            *("trainer.accelerator=cpu", "run.save_every=2", f"run.dir={run}", *more),
        ]

    return words


@pytest.fixture(scope="module")
def undisturbed(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(run)) == 0
    return run


def assert_same_end(run: Path, undisturbed: Path) -> None:
    one, two = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (run, undisturbed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    figures = [json.loads((at / "fit.json").read_text()) for at in (run, undisturbed)]
    assert all(figures[0][key] == figures[1][key] for key in ("train_loss", "val_loss_after", "steps"))
    tables = [[row for row in rows(at) if row.get("train/loss")] for at in (run, undisturbed)]
    assert tables[0] == tables[1] and len(tables[0]) == STEPS
    assert [row for row in rows(run) if row.get("val/loss")] == [
        row for row in rows(undisturbed) if row.get("val/loss")
    ]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Any], None], *, where: str) -> None:
    """Do something in a hook of a callback, once."""
    original, done = getattr(Throughput, where), list[int]()

    def hook(self: Throughput, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.state.fn == "fit" and trainer.global_step == step and not done:
            done.append(step)
            act(pl_module)
        original(self, trainer, pl_module, *args)

    monkeypatch.setattr(Throughput, where, hook)


@pytest.mark.parametrize(
    ("number", "where", "step", "saved"),
    [
        (signal.SIGTERM, "on_train_batch_start", 4, 5),
        (signal.SIGINT, "on_train_batch_start", 2, 3),  # a validation follows, and comes before the checkpoint
        (signal.SIGTERM, "on_validation_start", 3, 3),
    ],
    ids=["SIGTERM", "SIGINT", "in a validation"],
)
def test_a_signal_saves_the_step_and_stops(
    number: signal.Signals,
    where: str,
    step: int,
    saved: int,
    command: Callable[..., list[str]],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda _: os.kill(os.getpid(), number), where=where)
        assert main(command(tmp_path / "run")) == 128 + number
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("SIG")]
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert said == [
        f"{number.name}: step {saved} is saved in {newest}; the same command with run.resume=true goes on from there"
    ]
    assert newest.name == f"step-{saved:06d}.ckpt"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert main(command(tmp_path / "run", "run.resume=true")) == 0
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_full_disk_leaves_the_checkpoint_before(
    command: Callable[..., list[str]],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, run = checkpoint_files._Summed.write, tmp_path / "run"

    def full(self: Any, data: bytes) -> int:
        if checkpoints(run / "checkpoints") and self.bytes > 5000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files._Summed, "write", full)
        assert main(command(run)) == 2
    said = capsys.readouterr().err
    assert "step-000003.ckpt: cannot be written: no space is left there" in said and "run.resume=true" in said
    found = {path.name for path in (run / "checkpoints").iterdir()}
    assert found == {"step-000002.ckpt", "step-000002.ckpt.json"}, "no half of a file"
    assert main(command(run, "run.resume=true")) == 0
    assert_same_end(run, undisturbed)


def test_a_damaged_checkpoint_names_the_one_before_which_works(
    command: Callable[..., list[str]], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command(run, f"trainer.max_steps={STEPS - 1}", "optimizer.schedule=constant")) == 0
    newest, before = checkpoints(run / "checkpoints")[-1], checkpoints(run / "checkpoints")[-2]
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch.load takes it
    for damage, told in ((bytes(flipped), "its CRC-32 is not"), (whole[:-100], f"{len(whole) - 100:,} bytes")):
        newest.write_bytes(damage)
        capsys.readouterr()
        assert main(command(run, "run.resume=true")) == 2
        said = capsys.readouterr().err
        assert str(newest) in said and told in said
    way_out = re.search(r"run\.resume=(\S+)", said)
    assert way_out is not None and Path(way_out[1]) == before
    assert main(command(run, way_out[0])) == 0
    assert_same_end(run, undisturbed)


def test_a_data_file_that_goes_while_it_is_streamed(
    command: Callable[..., list[str]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, run = tmp_path / "copy.jsonl", tmp_path / "run"
    copy.write_bytes(text.read_bytes())
    more = (f"data.train={copy}", "data.streaming=true", "trainer.val_check_interval=null", "data.validation=null")
    with monkeypatch.context() as patch:  # step 5 ends the first epoch, and the second one opens the file anew
        at_step(patch, 3, lambda _: copy.unlink(), where="on_train_batch_start")
        assert main(command(run, *more)) == 2
    said = capsys.readouterr().err
    assert f"{copy}: cannot be read: No such file" in said and "run.resume=true" in said
    copy.write_bytes(text.read_bytes())
    assert main(command(run, *more, "run.resume=true")) == 0


def test_a_weight_that_breaks_is_named_with_the_last_good_checkpoint(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def infect(module: LanguageModule) -> None:
        with torch.no_grad():
            next(p for n, p in module.named_parameters() if "layers.1.mlp" in n and "lora_B" in n).fill_(torch.nan)

    run = tmp_path / "run"
    # After the last look of the guard, so that the step's own checkpoint holds it: that one is not good.
    at_step(monkeypatch, 4, infect, where="on_train_batch_end")
    assert main(command(run)) == 2
    said = capsys.readouterr().err
    assert re.search(r"the loss is nan at step 4 .*layers\.1\.mlp", said)
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-000003.ckpt'}" in said


def test_the_best_checkpoint_stays_with_the_last_ones(command: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("optimizer.lr=30", "run.keep=1", "trainer.val_check_interval=2")  # too high: the last is not the best
    assert main(command(run, *more)) == 0
    losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in rows(run) if "val/loss" in row}
    best = min(range(1, STEPS + 1), key=losses.__getitem__)
    assert best < STEPS
    directory = run / "checkpoints"
    assert best_checkpoint(directory) == (directory / f"step-{best:06d}.ckpt", losses[best])
    assert [path.name for path in checkpoints(directory)] == [f"step-{best:06d}.ckpt", f"step-{STEPS:06d}.ckpt"]
