"""A tokenizer as metadata of a GGUF file: byte-level BPE, and BPE of SentencePiece's kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qtrain.errors import ExportError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PIECES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"}}, PIECES],
    "qwen2": [{"type": "Split", "pattern": {"Regex": rf"{WORDS}|\p{{N}}|{REST}"}}, PIECES],
}
"""llama.cpp's names of how text is split before BPE, by what tokenizer.json says of it."""


@dataclass
class Vocabulary:
    """What a file says of its tokenizer.

    Attributes:
        model: gpt2 (byte-level BPE) or llama (SentencePiece's).
        pre: llama.cpp's name of how text is split.
        tokens: by id, as many as the embedding has rows.
        types: of each.
        scores: of each, for SentencePiece's: the higher, the sooner two pieces become that token.
        merges: ``a b``, first to last.
        flags: add_bos_token, add_eos_token, add_space_prefix.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None
    merges: list[str]
    flags: dict[str, bool] = field(default_factory=dict)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int, pre_tokenizer: str | None) -> Vocabulary:
    """The vocabulary, filled up to the embedding's rows.

    Raises:
        ExportError: a tokenizer that is no BPE, more tokens than rows, or a split with no known name.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a {model['type']} tokenizer", rule="GGUF is written with BPE tokenizers")
    names = {index: token for token, index in model["vocab"].items()} | {
        token["id"]: token["content"] for token in content["added_tokens"]
    }
    if max(names) >= rows:
        raise ExportError(f"token {max(names)} with an embedding of {rows} rows", rule="each token has its row")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [TokenType.NORMAL if index in names else TokenType.UNUSED for index in range(rows)]
    for token in content["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    flags = _affixes(tokenizer)
    if _is_byte_level(content):
        pre = pre_tokenizer or split_name(content["pre_tokenizer"])
        flags["add_space_prefix"] = False
        return Vocabulary("gpt2", pre, tokens, types, None, [f"{one} {other}" for one, other in pairs], flags)
    if not model["byte_fallback"]:
        raise ExportError("BPE neither of bytes nor falling back to them", rule="llama.cpp reads those two kinds")
    for value in range(256):
        if (index := model["vocab"].get(f"<0x{value:02X}>")) is not None:
            types[index] = TokenType.BYTE
    if model["unk_token"] in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for rank, (one, other) in enumerate(pairs):
        ranks.setdefault(one + other, rank)
    flags["add_space_prefix"] = _prepends_space(content)
    scores = [-float(ranks.get(token, len(pairs))) for token in tokens]
    return Vocabulary("llama", pre_tokenizer or "default", tokens, types, scores, [], flags)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of a pre-tokenizer of byte-level BPE.

    Raises:
        ExportError: it is not known here.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    for name, expected in SPLITS.items():
        if len(steps) == len(expected) and all(a.items() <= b.items() for a, b in zip(expected, steps, strict=True)):
            return name
    raise ExportError(
        f"a pre-tokenizer that is none of {', '.join(SPLITS)}",
        where="tokenizer.json",
        rule="llama.cpp splits text by a name in the file, and one that does not fit gives other tokens",
        fix="export.pre_tokenizer=NAME, as llama.cpp's convert_hf_to_gguf.py has it for this model",
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """The metadata tokenizer.*, chat template included."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            add(index)
    writer.add_add_bos_token(vocabulary.flags["add_bos_token"])
    writer.add_add_eos_token(vocabulary.flags["add_eos_token"])
    writer.add_add_space_prefix(vocabulary.flags["add_space_prefix"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _is_byte_level(content: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]])


def _affixes(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    ids = tokenizer("a")["input_ids"]
    return {
        "add_bos_token": len(ids) > 1 and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }


def _prepends_space(content: dict[str, Any]) -> bool:
    before = json.dumps(content["normalizer"])
    after = content["pre_tokenizer"] or {}
    return '"Prepend"' in before or after.get("prepend_scheme", "never") != "never"
