"""Resuming: the next batch is the very one that would have come."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qtrain.data.config import DataSection
from qtrain.data.datamodule import LanguageData
from qtrain.errors import CheckpointError

pytestmark = [
    # Lightning 2.6.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "sleeps", "capital", "of", "France"]


class Recorder(lightning.LightningModule):
    """Notes the batches it is given; its one weight depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["input_ids"].flatten().tolist()))
        return (self.weight * batch["input_ids"].float().mean() / 1000 * (1 + batch_idx)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert batch_idx < 19

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(lightning.Callback):
    """A checkpoint after each optimizer step and after each epoch, in the order in which they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths, self.steps = folder, [], 0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.save(trainer, f"step{trainer.global_step}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.save(trainer, f"epoch{trainer.current_epoch}-step{trainer.global_step}")

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, f"validated{trainer.current_epoch}-step{trainer.global_step}")

    def save(self, trainer: lightning.Trainer, name: str) -> None:
        self.paths.append(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "train.jsonl"
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(14):
            answer = " ".join(draw.choices(WORDS, k=draw.randint(2, 20)))
            file.write(json.dumps({"prompt": f"{number}?", "completion": answer}) + "\n")
    return path


def fit(
    path: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, resume: Path | None = None, **options: Any
) -> tuple[Recorder, list[Path]]:
    trainer_keys = {"accumulate_grad_batches", "max_steps", "max_epochs", "limit_train_batches", "limit_val_batches"}
    trainer_options = {key: options.pop(key) for key in trainer_keys & options.keys()}
    section = DataSection(train=str(path), validation=str(path), max_length=64, batch_size=2, **options)
    saver = Saver(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_checkpointing=False,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    model = Recorder()
    trainer.fit(model, datamodule=LanguageData(section, tokenizer, seed=3), ckpt_path=resume, weights_only=True)
    return model, saver.paths


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 9}, {"max_epochs": 2, "limit_train_batches": 3}])
@pytest.mark.parametrize("streaming,accumulate", [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_resume_from_every_checkpoint(
    chats: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    streaming: bool,
    accumulate: int,
    limit: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qtrain.data.stream.BLOCK_RECORDS", 5)
    options = {"streaming": streaming, "accumulate_grad_batches": accumulate, **limit}
    straight, checkpoints = fit(chats, tiny_tokenizer, tmp_path / "straight", **options)
    assert any(path.name.startswith("epoch1") for path in checkpoints)
    for checkpoint in checkpoints:
        resumed, _ = fit(chats, tiny_tokenizer, tmp_path / "resumed", resume=checkpoint, **options)
        done = len(straight.seen) - len(resumed.seen)
        assert resumed.seen == straight.seen[done:], checkpoint.name
        assert torch.equal(resumed.weight, straight.weight), checkpoint.name


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_with_workers(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool
) -> None:
    straight, checkpoints = fit(chats, tiny_tokenizer, tmp_path / "0", streaming=streaming, max_epochs=2)
    worked, _ = fit(chats, tiny_tokenizer, tmp_path / "2", streaming=streaming, max_epochs=2, workers=2)
    assert worked.seen == straight.seen
    middle = next(path for path in checkpoints if path.name == "step2.ckpt")
    resumed, _ = fit(chats, tiny_tokenizer, tmp_path / "3", middle, streaming=streaming, max_epochs=2, workers=2)
    assert resumed.seen == straight.seen[2:]


def test_epochs_differ_and_seed_decides(chats: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    section = DataSection(train=str(chats), max_length=64, batch_size=2)

    def epochs(seed: int) -> list[list[list[int]]]:
        data = LanguageData(section, tiny_tokenizer, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        return [[batch["input_ids"].flatten().tolist() for batch in loader] for _ in range(2)]

    first, second = epochs(1)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


@pytest.mark.parametrize("streaming", [False, True])
def test_loader_resumes_without_lightning(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    section = DataSection(train=str(chats), max_length=64, batch_size=2, streaming=streaming)

    def loader() -> Any:
        data = LanguageData(section, tiny_tokenizer)
        data.setup("fit")
        return data.train_dataloader()

    def ids(batches: Any) -> list[list[int]]:
        return [batch["input_ids"].flatten().tolist() for batch in batches]

    one = loader()
    expected = ids(one) + ids(one)
    other = loader()
    ids(other)
    iterator = iter(other)
    for _ in range(2):
        next(iterator)
    third = loader()
    third.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert ids(third) == expected[len(expected) // 2 + 2 :]


def test_other_data_is_refused(chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def loader(path: Path, **options: Any) -> Any:
        data = LanguageData(DataSection(train=str(path), max_length=64, **options), tiny_tokenizer)
        data.setup("fit")
        return data.train_dataloader()

    state = loader(chats).state_dict()
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        other = LanguageData(DataSection(train=str(chats), max_length=64), tiny_tokenizer, seed=1)
        other.setup("fit")
        other.train_dataloader().load_state_dict(state)
    edited = tmp_path / "edited.jsonl"
    edited.write_text(chats.read_text().replace("fox", "dog"))
    with pytest.raises(CheckpointError, match="checksum"):
        loader(edited).load_state_dict(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_position_holds_for_batches_of_another_size(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    def loader(batch_size: int) -> Any:
        section = DataSection(
            train=str(chats), max_length=64, batch_size=batch_size, streaming=streaming, packing=False
        )
        data = LanguageData(section, tiny_tokenizer)
        data.setup("fit")
        return data.train_dataloader()

    def labels(batches: Any) -> list[list[int]]:
        return [[x for x in row if x != -100] for batch in batches for row in batch["labels"].tolist()]

    one = loader(2)
    iterator = iter(one)
    begun = labels([next(iterator), next(iterator)])
    other = loader(4)
    other.load_state_dict(one.state_dict())
    assert begun + labels(other) == labels(loader(2))
    with pytest.raises(CheckpointError, match="4 rows into the epoch, within a batch of 3"):
        loader(3).load_state_dict(one.state_dict())


def test_global_random_state_is_untouched(chats: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = LanguageData(DataSection(train=str(chats), max_length=64), tiny_tokenizer)
    before = torch.get_rng_state()
    data.setup("fit")
    for _ in data.train_dataloader():
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_without_repeating(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, ranks: int, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equally many batches on each rank, and together they train exactly the tokens that one rank trains."""
    section = DataSection(train=str(chats), max_length=64, batch_size=2, streaming=streaming)

    def batches(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        monkeypatch.setattr(LanguageData, "_rank", rank)
        monkeypatch.setattr(LanguageData, "_world_size", world_size)
        data = LanguageData(section, tiny_tokenizer)
        data.setup("fit")
        return list(data.train_dataloader())

    def trained(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
        return sorted(row for batch in batches for row in batch["labels"].tolist() if any(x != -100 for x in row))

    shares = [batches(rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert trained([batch for share in shares for batch in share]) == trained(batches(0, 1))
