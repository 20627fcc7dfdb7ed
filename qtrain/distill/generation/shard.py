"""One shard: a stretch of the rows, decided by its number."""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from qtrain.distill.generation.beginnings import Vocabulary, beginnings
from qtrain.distill.generation.config import GenerateDataSection
from qtrain.distill.generation.decode import Texts, decode
from qtrain.errors import ModelError


def shard_steps(rows: int, vocabulary: Vocabulary, section: GenerateDataSection) -> int:
    """How many times ``generate_shard`` yields."""
    return -(-rows // section.batch_size) * (section.length - len(vocabulary.prefix) - 1)


def generate_shard(
    model: PreTrainedModel, vocabulary: Vocabulary, section: GenerateDataSection, number: int, rows: int
) -> Generator[int, None, tuple[NDArray[np.int64], float | None]]:
    """Write the first ``rows`` rows of shard ``number``, yielding once a column of each batch.

    First tokens and random numbers follow from (seed, number); products in batches of another size, in another
    precision or on another device round otherwise, and near-ties then fall otherwise.

    Args:
        model: causal LM in eval mode; the caller's autocast holds.

    Returns:
        ids [rows, length], and the mean entropy of the distributions sampled from, in nats (None if none was).

    Raises:
        ModelError: rows are longer than the model's context, too many for the memory, or its logits are not finite.
    """
    _check_context(model, section.length)
    begin = number * section.shard_rows
    first, greedy = beginnings(vocabulary.first, section.greedy_lengths, range(begin, begin + rows), section.seed)
    uniforms = np.random.default_rng([section.seed, 1, number]).random((rows, section.length), dtype=np.float32)
    prefix = len(vocabulary.prefix)
    ids = np.zeros((rows, section.length), dtype=np.int64)
    ids[:, :prefix], ids[:, prefix] = vocabulary.prefix, first
    greedy = np.minimum(prefix + greedy, section.length)
    entropy = 0.0
    for start in range(0, rows, section.batch_size):
        part = slice(start, start + section.batch_size)
        tokens, ends, numbers = (
            torch.from_numpy(array[part]).to(model.device, copy=True) for array in (ids, greedy, uniforms)
        )
        texts = Texts(ids=tokens, given=prefix + 1, greedy=ends, uniforms=numbers)
        try:
            summed = yield from decode(
                model, texts, vocabulary=vocabulary.size, temperature=section.temperature, top_k=section.top_k
            )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"no memory for {section.batch_size} rows of {section.length} tokens at once",
                fix=f"generate_data.batch_size={max(1, section.batch_size // 2)}; shards that are written stay",
            ) from None
        ids[part] = texts.ids.cpu().numpy()
        entropy += float(summed.sum())
    if not math.isfinite(entropy):
        raise ModelError("the model's logits are not finite", rule="no text can be sampled from them")
    sampled = int((section.length - greedy).sum())
    return ids, entropy / sampled if sampled else None


def _check_context(model: PreTrainedModel, length: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ModelError(
            f"rows of {length} tokens, and the model's context has {limit}", fix=f"generate_data.length={limit}"
        )
