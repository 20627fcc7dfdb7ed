"""The data module: windows, truncation, what is dropped and refused, prompts, the summary."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qtrain.data.config import DataSection
from qtrain.data.datamodule import LanguageData
from qtrain.errors import DataError, ModelError


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def module(tokenizer: PreTrainedTokenizerFast, stage: str | None = None, **options: Any) -> LanguageData:
    data = LanguageData(DataSection(**options), tokenizer)
    data.setup(stage)
    return data


def test_perplexity_protocol(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A text file: tokenized whole, no special token, windows that do not overlap, the last one kept, in order."""
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = Title = \n \n The quick brown fox . \n" * 30)
    ids = tiny_tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert len(ids) % 32
    data = module(tiny_tokenizer, "validate", validation=str(path), max_length=32, batch_size=3)
    batches = list(data.val_dataloader())
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    last = len(ids) % 32
    assert rows[:-1] == [ids[start : start + 32] for start in range(0, len(ids) - last, 32)]
    assert rows[-1][:last] == ids[-last:]
    assert all(batch["labels"][:, 0].eq(-100).all() for batch in batches)
    assert torch.equal(batches[0]["labels"][:, 1:], batches[0]["input_ids"][:, 1:])
    # Whole windows need neither positions nor mask.
    assert set(batches[0]) == {"input_ids", "labels", "tokens", "loss_tokens", "rows"}
    summary = data.summary.splits["validation"]
    assert (summary.tokens, summary.loss_tokens) == (len(ids), len(ids) - len(rows))
    assert summary.loss_tokens == sum(int(batch["loss_tokens"]) for batch in batches)
    assert (summary.samples, summary.split_documents, summary.truncated) == (1, 1, 0)


def test_documents_end_with_eos(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "docs.jsonl", {"text": "the fox"}, {"text": "lazy"})
    (batch,) = module(tiny_tokenizer, "fit", train=path, max_length=32, packing=False, shuffle=False).train_dataloader()
    first, second = batch["input_ids"].tolist()
    assert tiny_tokenizer.decode(first) == "the fox<|im_end|>"
    assert tiny_tokenizer.decode(second).startswith("lazy<|im_end|>")


def test_long_chats_are_cut_and_counted(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long = {"prompt": "q", "completion": "the quick brown fox " * 30}
    lost = {"prompt": "the quick brown fox " * 30, "completion": "a"}
    path = write(tmp_path / "chats.jsonl", {"prompt": "q", "completion": "a"}, long, lost)
    data = module(tiny_tokenizer, "fit", train=path, max_length=40)
    summary = data.summary.splits["train"]
    lengths = [
        len(tiny_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
        for chat in (
            [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
            for record in (long, lost)
        )
    ]
    assert (summary.samples, summary.truncated, summary.masked) == (3, 2, 1)
    assert summary.tokens_cut == sum(lengths) - 80
    assert summary.length_max == max(lengths)
    assert max(int(batch["tokens"]) for batch in data.train_dataloader()) <= 4 * 40


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_to_train_on(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool) -> None:
    masked = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_weight": 0}]}
    path = write(tmp_path / "masked.jsonl", masked, masked)
    with pytest.raises(DataError, match="all 2 samples are masked") as caught:
        module(tiny_tokenizer, "fit", train=path, streaming=streaming)
    assert f"{path}:1 (sample 1)" in str(caught.value)
    assert module(tiny_tokenizer, "fit", train=path, train_on="all").summary.splits["train"].masked == 0


@pytest.mark.parametrize("text", ["\n \n", "[]"])
def test_no_samples(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str) -> None:
    path = tmp_path / "void.json"
    path.write_text(text)
    with pytest.raises(DataError, match="void.json: no samples"):
        module(tiny_tokenizer, "fit", train=str(path))
    path = tmp_path / "void.txt"
    path.write_text("a")
    with pytest.raises(DataError, match="void.txt: no text"):
        module(tiny_tokenizer, "fit", train=str(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_in_a_stream_is_told_whole(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtrain.data.stream.BLOCK_RECORDS", 4)
    path = write(tmp_path / "data.jsonl", *[{"text": f"number {n}"} for n in range(6)])
    Path(path).write_text(Path(path).read_text() + "{\n")
    data = module(tiny_tokenizer, "fit", train=path, streaming=True, max_length=16, batch_size=1, workers=workers)
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    assert caught.value.where == f"{path}:7 (sample 7)"
    assert str(caught.value).startswith(f"{path}:7 (sample 7): this line is no JSON")


def test_stream_and_memory_hold_the_same(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *[{"prompt": str(n), "completion": "fox " * (n % 7 + 1)} for n in range(40)])

    def rows(**options: Any) -> list[list[int]]:
        loader = module(tiny_tokenizer, "fit", train=path, max_length=48, **options).train_dataloader()
        return sorted(row for batch in loader for row in batch["input_ids"].tolist())

    assert rows(streaming=True) == rows()
    assert rows(streaming=True, shuffle=False, packing=False, batch_size=1) == rows(packing=False, batch_size=1)


def test_prompts(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    asked = {"messages": [{"role": "user", "content": "q"}]}
    data = module(tiny_tokenizer, "predict", predict=write(tmp_path / "chats.jsonl", chat, asked), max_length=64)
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [(tiny_tokenizer.decode(ids), text) for ids, text in data.prompts()] == [
        (head + "one<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", "two"),
        (head, ""),
    ]
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].shape[0] == 2
    assert "attention_mask" in batch
    documents = module(tiny_tokenizer, "predict", predict=write(tmp_path / "docs.jsonl", {"text": "the fox"}))
    assert [(tiny_tokenizer.decode(ids), text) for ids, text in documents.prompts()] == [("the fox", "")]


def test_summary(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = [{"prompt": "q", "completion": "fox " * n} for n in range(1, 21)]
    path = write(tmp_path / "data.jsonl", *records)
    data = module(tiny_tokenizer, train=path, validation=path, test=path, max_length=48)
    facts = json.loads(json.dumps(data.summary.to_dict(), allow_nan=False))
    assert list(facts) == ["train", "validation", "test"]
    train = facts["train"]
    assert sum(train["histogram_counts"]) == train["samples"] == 20
    assert len(train["histogram_edges"]) == len(train["histogram_counts"]) + 1
    assert train["length_min"] <= train["length_p50"] <= train["length_p90"] <= train["length_max"]
    assert train["example"][0] == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False]
    assert train["example"][1][1] is True
    batches = list(data.train_dataloader())
    assert train["tokens"] == sum(int(batch["tokens"]) for batch in batches)
    assert train["loss_tokens"] == sum(int(batch["loss_tokens"]) for batch in batches)
    places = sum(batch["input_ids"].numel() for batch in batches)
    assert train["efficiency"] == pytest.approx(train["tokens"] / places)
    lines = data.summary.lines()
    assert any(line.startswith("train       rows") for line in lines)
    assert all("\n" not in line for line in lines)


def test_slow_tokenizer_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError, match="need a fast tokenizer"):
        LanguageData(DataSection(), tiny_tokenizer)


def test_setup_reads_each_split_once(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    data = LanguageData(DataSection(train=write(path, {"text": "the fox"})), copy.deepcopy(tiny_tokenizer))
    data.setup("fit")
    path.unlink()
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 1
    with pytest.raises(DataError, match="data.test is not set"):
        data.test_dataloader()
