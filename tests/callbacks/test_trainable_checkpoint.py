"""Checkpoints hold what trains, go on bit-exactly, and are refused where they do not belong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.callbacks.checkpoint_files import check, checkpoints, retain, step_of
from qtrain.callbacks.trainable_checkpoint import TrainableCheckpoint, read_checkpoint
from qtrain.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),  # resuming is just that
]


class Frozen(L.LightningModule):
    """A frozen layer, a trained one, and noise from all three kinds of generators."""

    def __init__(self, width: int = 4, fingerprint: str | None = "base-1") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.adapter = nn.Linear(8, width)
        self.base_fingerprint = fingerprint
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = nn.functional.dropout(self.base(batch), 0.5) * (1 + random.random() + np.random.rand())
        loss = self.adapter(x).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def run(
    module: Frozen, directory: Path, steps: int, *, resume: Path | None = None, seed: int = 1, **keys: Any
) -> Frozen:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrainableCheckpoint(str(directory), **{"every_n_train_steps": 2, **keys})],
    )
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(7))
    # Its own generator: a loader draws from the global one whenever it starts, resumed runs once more than others.
    loader = DataLoader(list(rows), batch_size=2, generator=torch.Generator())
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module


def names(directory: Path) -> list[str]:
    """Of checkpoints; beside each lies its checksum."""
    found = sorted(file.name for file in directory.iterdir())
    checkpoints = [name for name in found if name.endswith(".ckpt")]
    assert found == sorted([*checkpoints, *(f"{name}.json" for name in checkpoints)])
    return checkpoints


def test_the_last_ones_stay_and_the_last_step_is_among_them(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 7, keep=2)
    assert names(tmp_path) == ["step-000006.ckpt", "step-000007.ckpt"]


def test_without_an_interval_it_is_the_end_of_each_epoch(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 25, keep=9, every_n_train_steps=0)  # ten steps an epoch
    assert names(tmp_path) == ["step-000010.ckpt", "step-000020.ckpt", "step-000025.ckpt"]


def test_it_holds_what_trains_as_plain_data(tmp_path: Path) -> None:
    module = run(Frozen(), tmp_path, 2)
    content = torch.load(tmp_path / "step-000002.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {"adapter.weight", "adapter.bias"}
    assert torch.equal(content["state_dict"]["adapter.weight"], module.adapter.weight)
    assert content["qtrain"]["fingerprint"] == "base-1"
    assert read_checkpoint(str(tmp_path / "step-000002.ckpt"))["global_step"] == 2


class Normalized(Frozen):
    """Running statistics: of a frozen layer, of a trained one, of one without parameters; and a buffer not to save."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()
        self.adapter = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # the frozen ones
def test_running_statistics_go_with_what_trains(tmp_path: Path) -> None:
    straight = run(Normalized(), tmp_path / "a", 16)
    content = read_checkpoint(str(run_to(Normalized(), tmp_path / "b", 10)))
    kept = {f"adapter.{n}.{name}" for n in (0, 1) for name in ("running_mean", "running_var", "num_batches_tracked")}
    trained = {"adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
    assert set(content["state_dict"]) == kept | trained
    resumed = run(Normalized(), tmp_path / "b", 16, resume=tmp_path / "b" / "step-000010.ckpt", seed=99)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def run_to(module: Frozen, directory: Path, steps: int) -> Path:
    run(module, directory, steps)
    return directory / f"step-{steps:06d}.ckpt"


def test_a_run_goes_on_bit_exactly(tmp_path: Path) -> None:
    # Over the end of an epoch of ten steps: torch's own loader cannot start in the middle of one.
    straight = run(Frozen(), tmp_path / "a", 16)
    first = run(Frozen(), tmp_path / "b", 10)
    # Another seed: whatever is drawn before the first batch must not count.
    second = run(Frozen(), tmp_path / "b", 16, resume=tmp_path / "b" / "step-000010.ckpt", seed=99)
    assert first.losses + second.losses == straight.losses
    assert torch.equal(second.adapter.weight, straight.adapter.weight)


def more_trained() -> Frozen:
    module = Frozen()
    module.base.bias.requires_grad_(True)
    return module


def less_trained() -> Frozen:
    module = Frozen()
    module.adapter.bias.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Frozen(fingerprint="base-2"), "another base"),
        (lambda: Frozen(width=5), r"adapter\.(bias|weight) is \(4"),
        (more_trained, r"base\.bias is absent in the checkpoint and \(8,\) here"),
        (less_trained, r"adapter\.bias is \(4,\) in the checkpoint and absent here"),
    ],
    ids=["another-base", "another-shape", "more-trains", "less-trains"],
)
def test_it_is_refused_where_it_does_not_belong(other: Any, message: str, tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 2)
    with pytest.raises(CheckpointError, match=message) as caught:
        run(other(), tmp_path, 4, resume=tmp_path / "step-000002.ckpt")
    assert "step-000002.ckpt" in str(caught.value)


def test_after_training_any_weights_may_be_loaded(tmp_path: Path) -> None:
    module = run(Frozen(), tmp_path, 2)
    other = Frozen().state_dict()
    module.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


def test_a_checkpoint_of_lightning_alone_is_refused(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 2)
    content = torch.load(tmp_path / "step-000002.ckpt", weights_only=True)
    del content["qtrain"]
    torch.save(content, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="not written by TrainableCheckpoint"):
        run(Frozen(), tmp_path, 4, resume=tmp_path / "plain.ckpt")


def test_damaged_absent_and_pickled_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(str(tmp_path / "none.ckpt"))
    run(Frozen(), tmp_path, 2)
    path = tmp_path / "step-000002.ckpt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(str(path))
    torch.save({"object": Frozen()}, tmp_path / "pickle.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(str(tmp_path / "pickle.ckpt"))


def test_a_damaged_file_names_the_one_before_it(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 8, keep=4)
    paths = checkpoints(tmp_path)
    for path in paths[2:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    for how in (lambda: check(paths[3]), lambda: run(Frozen(), tmp_path, 9, resume=paths[3])):
        with pytest.raises(CheckpointError, match=r"step-000008.ckpt: .*damaged: its CRC-32") as caught:
            how()
        assert f"run.resume={paths[1]} " in str(caught.value), "the newest that is whole"
    (tmp_path / "step-000004.ckpt.json").write_text("{")
    with pytest.raises(CheckpointError, match="bytes"):
        check(paths[1])


def test_a_checkpoint_without_a_checksum_is_read(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 2)
    (tmp_path / "step-000002.ckpt.json").unlink()
    assert read_checkpoint(str(tmp_path / "step-000002.ckpt"))["global_step"] == 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # any rows will do
def test_what_another_run_left_stays_and_what_this_one_gave_up_goes(tmp_path: Path) -> None:
    run(Frozen(), tmp_path, 9, keep=9)
    earlier = names(tmp_path)
    assert earlier == [f"step-{step:06d}.ckpt" for step in (2, 4, 6, 8, 9)]
    run(Frozen(), tmp_path, 3, keep=1)  # from the start, in the same directory: the others are not its own
    assert names(tmp_path) == ["step-000003.ckpt", *earlier[1:]]
    run(Frozen(), tmp_path, 6, keep=2, resume=tmp_path / "step-000004.ckpt")
    assert names(tmp_path) == ["step-000004.ckpt", "step-000006.ckpt"], "steps 8 and 9 were another course"


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (".step-000002.ckpt.abc.tmp", ".step-000004.ckpt.json.abc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    run(Frozen(), tmp_path, 2)
    assert names(tmp_path) == ["step-000002.ckpt"]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (999999, 1000000, 2):
        (tmp_path / f"step-{step:06d}.ckpt").touch()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 999999, 1000000]
    retain(tmp_path, 2, 1000000)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [999999, 1000000]
