"""A 7B checkpoint and token rows on disk, for commands that start from files.

    python -m benchmarks.gpu.checkpoint --work DIR [--tiny]

All layers hold the same random weights, so that drawing them takes a second and no GPU; the files are as large as any.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.measure import arguments, shape_of, sizes
from benchmarks.gpu.shapes import LLAMA_7B, Shape
from qtrain.data.tokens.manifest import Manifest, Origin
from qtrain.data.tokens.shards import ShardWriter
from qtrain.files import atomic_directory, write_json

MODEL, BARE, TOKENS = "llama-7b", "llama-7b-bare", "tokens"
"""The checkpoint with a tokenizer; the same files with one as Llama's is, for peers that mend others; rows of ids."""

LLAMAS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def make_model(directory: Path, shape: Shape) -> None:
    """config.json, a tokenizer of as many words as ids, and a shard a layer in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    torch.set_default_dtype(torch.bfloat16)
    one = LlamaForCausalLM(LlamaConfig(**replace(shape, layers=1).config)).state_dict()
    torch.set_default_dtype(torch.float32)
    prefix = "model.layers.0."
    shards = [{name: tensor for name, tensor in one.items() if not name.startswith(prefix)}]
    layer = {name.removeprefix(prefix): tensor for name, tensor in one.items() if name.startswith(prefix)}
    shards += [{f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()} for i in range(shape.layers)]
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(directory / name), metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        total += sum(tensor.nbytes for tensor in shard.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    config.save_pretrained(directory)


def make_tokenizer(directory: Path, words: int, special: Mapping[str, str]) -> None:
    """One word an id; the last ones are ``special``, by their roles."""
    names = list(dict.fromkeys(special.values()))
    vocabulary = {f"w{i}": i for i in range(words - len(names))}
    vocabulary |= {name: words - len(names) + i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.save_pretrained(directory)


def make_tokens(directory: Path, rows: int, length: int, words: int) -> None:
    """Random ids [rows, length] as `qtrain generate-data` lays them down."""
    origin = Origin(
        model="random", tokenizer_size=words, length=length, shard_rows=rows, seed=0, options={"made": "at random"}
    )
    writer = ShardWriter(directory, Manifest(model_path="random", dtype="uint32", origin=origin))
    writer.write(0, np.random.default_rng(0).integers(0, words, (rows, length)))
    writer.finish({})


def main() -> None:
    """Make what is not there yet."""
    asked = arguments(__doc__, ()).parse_args()
    shape, size = shape_of(LLAMA_7B, asked), sizes(asked)
    if not (asked.work / MODEL).exists():
        with atomic_directory(asked.work / MODEL) as directory:
            make_model(directory, shape)
            make_tokenizer(directory, shape.vocab, {"eos_token": "</s>", "pad_token": "</s>"})
    if not (asked.work / BARE).exists():
        with atomic_directory(asked.work / BARE) as directory:
            for file in (asked.work / MODEL).iterdir():
                if file.suffix == ".safetensors":
                    os.link(file, directory / file.name)
                elif "token" not in file.name:
                    shutil.copy(file, directory)
            make_tokenizer(directory, shape.vocab, LLAMAS)
    if not (asked.work / TOKENS).exists():
        with atomic_directory(asked.work / TOKENS) as directory:
            make_tokens(directory, 4 * size.rows * (size.warm + size.steps), size.length, shape.vocab)
    os.sync()  # or the disk is busy with 13 GB while the first case is measured


if __name__ == "__main__":
    main()
