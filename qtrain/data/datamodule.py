"""The Lightning data module: files in, batches out."""

from __future__ import annotations

from functools import partial

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qtrain.data.collate import Batch, Collate, collate_packed, collate_padded
from qtrain.data.config import DataSection
from qtrain.data.encoding import Encoder, Tally
from qtrain.data.loader import ResumableLoader, RowLoader
from qtrain.data.numbered_rows import NumberedRows
from qtrain.data.preparation import Split, check_samples, describe, prepare, read_items
from qtrain.data.progress import Progress, settle_epoch
from qtrain.data.prompts import Prompt, prompt_of
from qtrain.data.sample import Sample, SampleStore
from qtrain.data.sources import SPLITS, locate_all
from qtrain.data.stream import RowStream, StreamLoader
from qtrain.data.summary import DataSummary
from qtrain.errors import DataError
from qtrain.modules.documents import with_documents
from qtrain.modules.token_loss import ROWS, with_kept

STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class LanguageData(lightning.LightningDataModule):
    """Text and chats as batches for a causal language model.

    A batch holds ``input_ids`` and ``labels`` [B, L], ``position_ids`` or ``attention_mask`` [B, L] where they are
    needed, the counts ``tokens`` and ``loss_tokens``, and ``rows`` [B], the numbers of its rows in the split (a stream
    has none). Labels stand at their own tokens; the loss shifts them.

    Args:
        section: the `data.*` keys.
        tokenizer: a fast tokenizer; it is given the chat template that is used, to be saved with it.
        seed: of the order of the training rows.

    Errors: DataError, from ``setup``, for whatever cannot be trained on.
    """

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
        super().__init__()
        self.section, self.tokenizer, self.seed = section, tokenizer, seed
        self.summary = DataSummary()
        self._encoder = Encoder(tokenizer, section)
        self._splits: dict[str, Split] = {}
        self._stream: RowStream | None = None
        if section.validation is None:
            # Lightning validates if this hook is overridden, and warns about a hook that returns no loader.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and pack the splits of that stage (all of them for None); what is known is not read again."""
        for split in SPLITS if stage is None else STAGES[stage]:
            if getattr(self.section, split) is None or split in self.summary.splits:
                continue
            if split == "train" and self.section.streaming:
                self._open_stream()
            else:
                self._prepare(split)

    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order decided by (seed, epoch); resumable in the middle of an epoch."""
        progress = None
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            settle_epoch(self.trainer, sized=self._stream is None)
            progress = Progress(self.trainer)
        if self._stream is None:
            return self._loader("train", shuffle=self.section.shuffle, progress=progress)
        return StreamLoader(
            self._stream,
            self._collate(packing=self.section.packing),
            batch_size=self.section.batch_size,
            seed=self.seed,
            workers=self.section.workers,
            rank=self._rank,
            world_size=self._world_size,
            progress=progress,
        )

    def val_dataloader(self) -> ResumableLoader:
        """The rows of ``data.validation`` in their order."""
        return self._loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        """The rows of ``data.test`` in their order."""
        return self._loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """The samples of ``data.predict`` in their order, one in a row, padded."""
        return self._loader("predict")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Row numbers stay on the host; documents, and which labels count, are found there: else it waits for the GPU.

        So it would for a copy from memory that may be paged out.
        """
        known: Batch = with_documents(with_kept(batch))
        if device.type == "cuda":
            known = {key: one.pin_memory() if one.numel() else one for key, one in known.items()}
        moved: Batch = super().transfer_batch_to_device(known, device, dataloader_idx)
        return {**moved, ROWS: batch[ROWS]} if ROWS in batch else moved

    def samples(self, split: str, tokens: int) -> list[Sample]:
        """The first samples of a split, so many that they hold ``tokens`` tokens, or all there are.

        Raises:
            DataError: the split was not read, or is read as a stream.
        """
        if split not in self._splits:
            raise DataError(f"data.{split} is not at hand", fix=f"data.{split}=FILE, and data.streaming=false")
        store, taken, held = self._splits[split].store, [], 0
        for index in range(len(store)):
            if held >= tokens:
                break
            taken.append(store[index])
            held += len(taken[-1])
        return taken

    def numbered_rows(self, split: str) -> NumberedRows:
        """All rows of a split as they are batched, by number.

        Raises:
            DataError: the split is not set, or is read as a stream.
        """
        if split not in self._splits:
            raise DataError(f"there is no data for this: data.{split} is not set", fix=f"data.{split}=FILE")
        prepared = self._splits[split]
        return NumberedRows(
            prepared.store, prepared.rows, self._collate(packing=self.section.packing and split != "predict")
        )

    def rows(self, split: str, count: int) -> list[Tensor]:
        """Token ids [1, tokens] of the first samples of a split: as many as hold ``count`` times max_length tokens."""
        if not count:
            return []
        samples = self.samples(split, count * self.section.max_length)
        return [torch.tensor(sample.input_ids)[None] for sample in samples if len(sample) > 1]

    def prompts(self) -> list[Prompt]:
        """Prompt ids with the generation prompt, and the reference, for each sample of ``data.predict``.

        Documents are prompts as they are.
        """
        items = read_items(locate_all(self.section.predict), self._encoder, split="predict")
        return [prompt_of(item, self._encoder) for item in items]

    def _prepare(self, split: str) -> None:
        predicting = split == "predict"
        encoder = Encoder(self.tokenizer, self.section, keep_masked=True) if predicting else self._encoder
        locations = locate_all(getattr(self.section, split))
        packing = self.section.packing and not predicting
        self._splits[split] = prepare(locations, encoder, split=split, packing=packing)
        self.summary.splits[split] = self._splits[split].summary

    def _open_stream(self) -> None:
        """Read the first block, so that mistakes in the data show before training; the summary is that block's."""
        locations = locate_all(self.section.train)
        stream = RowStream(locations, self._encoder, split="train", shuffle=self.section.shuffle, seed=self.seed)
        tally = Tally()
        store = SampleStore(stream.first_block(tally))
        check_samples(store, tally, locations, "train")
        rows = stream.pack(store.lengths)
        self._stream = stream
        packing = self.section.packing
        self.summary.splits["train"] = describe(store, tally, rows, self._encoder, packing=packing, streamed=True)

    def _loader(self, split: str, *, shuffle: bool = False, progress: Progress | None = None) -> RowLoader:
        return RowLoader(
            self.numbered_rows(split),
            batch_size=self.section.batch_size if split == "train" else self._eval_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=self.section.workers,
            rank=self._rank,
            world_size=self._world_size,
            progress=progress,
        )

    def _collate(self, *, packing: bool) -> Collate:
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        if packing:
            return partial(collate_packed, pad=pad, length=self.section.max_length)
        return partial(collate_padded, pad=pad)

    @property
    def _eval_batch_size(self) -> int:
        return self.section.eval_batch_size or self.section.batch_size

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
