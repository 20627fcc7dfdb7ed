"""Rows of token shards as samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qtrain.data.encoding import Tally
from qtrain.data.sample import SampleStore
from qtrain.data.sources import TokenDirectory
from qtrain.data.tokens.manifest import Manifest, read_complete
from qtrain.data.tokens.shards import read_shards
from qtrain.errors import DataError


def open_tokens(location: TokenDirectory, tokenizer_size: int) -> Manifest:
    """The manifest of shards that the model with this tokenizer can be trained on.

    Raises:
        DataError: the set is not complete, or its ids are another tokenizer's.
    """
    manifest = read_complete(location.path)
    made_for = manifest.origin.tokenizer_size
    if made_for != tokenizer_size:
        raise DataError(
            f"the ids are those of a tokenizer with {made_for} entries ({manifest.model_path}), the model's has "
            f"{tokenizer_size}",
            where=str(location),
            rule="token shards are trained on with the tokenizer they were made with",
            fix="`qtrain generate-data` with this model.path",
        )
    return manifest


def add_shards(
    location: TokenDirectory, manifest: Manifest, store: SampleStore, tally: Tally, max_length: int, vocabulary: int
) -> Iterator[None]:
    """Put all rows into ``store``, each token with loss but the first of a row; yields after each shard.

    A row longer than ``max_length`` becomes several samples; a rest of one token predicts nothing and is left out.

    Args:
        vocabulary: ids lie below it.

    Raises:
        DataError: they do not, or a file is not what was written.
    """
    length = manifest.origin.length
    parts = np.diff([*range(0, length, max_length), length])
    kept = length - 1 if parts[-1] == 1 else length
    parts = parts[parts > 1]
    for ids in read_shards(location.path, manifest):
        rows = len(ids)
        if ids.max(initial=0) >= vocabulary:
            raise DataError(
                f"an id of {ids.max()}",
                where=str(location),
                rule=f"ids of this tokenizer lie below {vocabulary}",
                fix="`qtrain generate-data` with this model.path",
            )
        store.extend(ids[:, :kept], np.tile(parts, rows))
        tally.lengths += [length] * rows
        tally.split_documents += rows * (length > max_length)
        yield
