"""From a config to token shards that the model itself wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qtrain.config.schema import Config
from qtrain.data.tokens.manifest import Manifest, Origin
from qtrain.data.tokens.shards import ShardWriter, read_shards
from qtrain.distill.generation.beginnings import Vocabulary, vocabulary_of
from qtrain.distill.generation.diversity import diversity
from qtrain.distill.generation.shard import generate_shard, shard_steps
from qtrain.evaluation.progress import progress
from qtrain.models.fingerprint import fingerprint
from qtrain.models.load import load_tokenizer
from qtrain.models.source import find_model
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import stored_subject


def generate_data(config: Config, run: RunDirectory) -> tuple[Path, Manifest]:
    """Write ``generate_data.tokens`` tokens of ``model.path``, as it is stored, as shards; where, and their manifest.

    Shards of the same origin that are there, whole, stay: a stopped call goes on, a larger number of tokens adds.

    Raises:
        DataError: shards of another model, other options or another seed lie there.
        ModelError: the model cannot write so long a text, or not so many at once.
    """
    section = config.generate_data
    directory = Path(section.dir) if section.dir else run.path / "tokens"
    tokenizer = load_tokenizer(config.model)
    vocabulary = vocabulary_of(tokenizer)
    origin = Origin(
        model=fingerprint(find_model(config.model), config.model.revision),
        tokenizer_size=len(tokenizer),
        length=section.length,
        shard_rows=section.shard_rows,
        seed=section.seed,
        options=section.model_dump(include={"greedy_lengths", "temperature", "top_k"}),
    )
    dtype = "uint16" if vocabulary.size <= 2**16 else "uint32"
    writer = ShardWriter(directory, Manifest(model_path=str(config.model.path), dtype=dtype, origin=origin))
    pending = writer.pending(section.rows)
    if pending:
        _write(config, vocabulary, writer, pending)
    if not writer.manifest.complete:
        shards = writer.manifest.shards
        arrays = progress(read_shards(directory, writer.manifest), "counting", total=len(shards))
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found = diversity(arrays, vocabulary=vocabulary.size, ends=ends)
        writer.finish(found.to_dict() | _entropy(writer.manifest))
    return directory, writer.manifest


def _write(config: Config, vocabulary: Vocabulary, writer: ShardWriter, pending: list[tuple[int, int]]) -> None:
    section, subject = config.generate_data, stored_subject(config)

    def steps() -> Iterator[int]:
        for number, rows in pending:
            ids, entropy = yield from generate_shard(subject.plain, vocabulary, section, number, rows)
            writer.write(number, ids, entropy=entropy)

    total = sum(shard_steps(rows, vocabulary, section) for _, rows in pending)
    with subject.forward_context():
        for _ in progress(steps(), "generating", total=total):
            pass


def _entropy(manifest: Manifest) -> dict[str, float]:
    """The mean over shards; each has as good as the same share of sampled tokens."""
    known = [(shard.entropy, shard.rows) for shard in manifest.shards if shard.entropy is not None]
    rows = sum(count for _, count in known)
    return {"entropy": sum(value * count for value, count in known) / rows} if rows else {}
