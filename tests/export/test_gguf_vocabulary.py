"""Tokenizers in a .gguf file: as transformers reads them, and as SentencePiece's algorithm uses the scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from qtrain.errors import ExportError
from qtrain.export.gguf.config import GgufOptions
from qtrain.export.gguf.vocabulary import vocabulary_of
from qtrain.export.gguf.write import write
from qtrain.modules.deployed import DeployedModel

Build = Callable[..., PreTrainedModel]
Deploy = Callable[[PreTrainedModel], DeployedModel]
TEXT = [
    "The year 2024 had 366 days; 12345 67 890 of them aren't 1st.",
    "Quantization  maps   real numbers to integers:\n\n\ta scale maps them BACK, doesn't it?",
    "Größe, naïve, 日本語 and \U0001f642 are text too.\r\n",
    "we're you'll I'd THEY'RE x=3.14159;y[10]+=1_000_000",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def split_by(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS: dict[str, Any] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(QWEN2),
}


def byte_level(pre_tokenizer: Any, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    )


def written(tmp_path: Path, model: DeployedModel, tokenizer: PreTrainedTokenizerFast, **keys: Any) -> dict[str, Any]:
    write(model, GgufOptions(format="gguf", **keys), tmp_path / "out", tokenizer=tokenizer, facts={})
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("name", SPLITS)
def test_a_file_spells_the_same_tokenizer(tmp_path: Path, tiny_model: Build, deploy: Deploy, name: str) -> None:
    tokenizer = byte_level(SPLITS[name])
    fields = written(tmp_path, deploy(tiny_model()), tokenizer)
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == name
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 512
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    control, defined, normal, unused = types["<|im_end|>"], types["<tool>"], types["a"], types["[PAD511]"]
    assert (control, defined, normal, unused) == (3, 4, 1, 5)
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.add_bos_token"] is False
    read = from_fields(fields)
    for text in [*TEXT, "<|im_start|>user\n12 days<|im_end|> <tool> 3"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and read.encode(text).ids == ids
    # transformers 5.17 reads all of them with GPT-2's split, 5.23 SmolLM's alone.
    known = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert known.chat_template == tokenizer.chat_template
    assert known("Days of the year")["input_ids"] == tokenizer("Days of the year")["input_ids"]


def from_fields(fields: dict[str, Any]) -> Tokenizer:
    """What the keys of a file spell: vocabulary, merges, whole tokens by their types, and the split by its name."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = SPLITS[fields["tokenizer.ggml.pre"]]
    whole = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind in (3, 4)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return tokenizer


def test_bos_is_added_where_the_tokenizer_does(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    fields = written(tmp_path, deploy(tiny_model()), byte_level(SPLITS["llama-bpe"], bos=True))
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False


def test_an_unknown_split_is_named(tmp_path: Path, tiny_model: Build, deploy: Deploy) -> None:
    model, tokenizer = deploy(tiny_model()), byte_level(split_by(r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"))
    with pytest.raises(ExportError, match="none of gpt-2, smollm, llama-bpe, qwen2.*\n.*\n.*export.pre_tokenizer=NAME"):
        written(tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert written(tmp_path, model, tokenizer, pre_tokenizer="tekken")["tokenizer.ggml.pre"] == "tekken"


def test_tokens_beyond_the_embedding_are_refused(tiny_model: Build) -> None:
    tokenizer = byte_level(BYTE_LEVEL)
    rows = len(tokenizer) - 1
    with pytest.raises(ExportError, match=f"token {rows} with an embedding of {rows} rows"):
        vocabulary_of(tokenizer, rows, None)


def test_other_kinds_of_tokenizers_are_refused() -> None:
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    with pytest.raises(ExportError, match="a Unigram tokenizer"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=unigram), 10, None)


def pieces(*, legacy: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes for the rest, as Llama 2 and Mistral have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=60
    )
    tokenizer.train_from_iterator([text for text in TEXT * 4 if text.isascii()], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE: of all neighbours that make a token join the two of the highest score, first of equals."""
    index = {token: number for number, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [
            (scores[index[a + b]], -at)
            for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in index
        ]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [index[part]] if part in index else [index[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("legacy", [True, False])
def test_scores_merge_as_the_merges_do(tmp_path: Path, tiny_model: Build, deploy: Deploy, legacy: bool) -> None:
    tokenizer = pieces(legacy=legacy)
    fields = written(tmp_path, deploy(tiny_model()), tokenizer)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x41>"], types["▁t"]) == (2, 3, 6, 1)
    for text in TEXT:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert by_scores(text, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]) == ids
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert read.decode(read(TEXT[0], add_special_tokens=False)["input_ids"]) == TEXT[0]
