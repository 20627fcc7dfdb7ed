"""The teacher's logits over the training rows, in files: written before the training, which then holds one model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from torch import Tensor

from qtrain.config.schema import Config
from qtrain.data.datamodule import LanguageData
from qtrain.data.numbered_rows import NumberedRows
from qtrain.distill.cached import MANIFEST, CachedLogits, CacheKey, read_record
from qtrain.distill.config import ONLINE
from qtrain.distill.teacher import Teacher, named_teacher
from qtrain.distill.write_cache import UNFINISHED, write_cache
from qtrain.errors import ConfigError, DataError
from qtrain.evaluation.progress import progress_over
from qtrain.models.fingerprint import fingerprint
from qtrain.models.source import find_model
from qtrain.training.run_directory import RunDirectory

LEAST_BYTES = 4
"""Of a cached log-probability: fp16, and its token as uint16 where the vocabulary allows."""


def training_rows(config: Config, data: LanguageData | None, *, handed_over: bool) -> NumberedRows:
    """What the cache is of, read from its files if it was not yet.

    Args:
        handed_over: the base was not loaded from ``model.path``.

    Raises:
        ConfigError: no data module; a teacher that has no files.
    """
    if data is None:
        raise ConfigError(
            "distill.teacher_logits=cached without the training data",
            rule="the cache is written when the model is built, over all training rows",
            fix="trainer.fit(module, datamodule=LanguageData(config.data, module.tokenizer)), or "
            f"module.build(device, data); {ONLINE}",
        )
    if handed_over and config.distill.teacher is None:
        raise ConfigError(
            "distill.teacher_logits=cached with a model that was handed over",
            rule="a cache is known again by the teacher's files",
            fix=f"save the model and name it, model.path=DIR; {ONLINE}",
        )
    data.setup("fit")
    return data.numbered_rows("train")


def cached_logits(
    config: Config, rows: NumberedRows, make_teacher: Callable[[], Teacher], *, world_size: int = 1
) -> CachedLogits:
    """The cache of ``rows``, written as far as it is missing; the teacher is made only if it has to be asked.

    It lies in ``distill.cache_dir``, else in RUN/teacher_logits. A cache of another teacher, other rows or another
    top_k or temperature is refused; but one in RUN/teacher_logits gives way to ``run.overwrite=true``, which keeps a
    cache that fits. A directory that was named may serve other runs, and is never removed.

    Args:
        rows: of the training, whatever their order.
        make_teacher: called once at most; what it returns is let go of at the end.
        world_size: processes that train; several of them read a finished cache, and write none.

    Raises:
        DataError: the cache there is another's; there is no room for it.
        ConfigError: it is not finished, and several processes would have to write it.
    """
    section, teacher = config.distill, cache(make_teacher)
    directory = Path(section.cache_dir).expanduser() if section.cache_dir else RunDirectory.of(config).teacher_logits
    finished = (directory / MANIFEST).is_file() and not (directory / UNFINISHED).exists()
    if world_size > 1:
        if not finished:
            raise ConfigError(
                f"{world_size} processes, and no finished cache of teacher logits in {directory}",
                rule="one process writes the cache, several can read it",
                fix="first trainer.devices=1 trainer.max_steps=1 run.name=cache distill.cache_dir=DIR, then all "
                f"devices with that DIR; {ONLINE}",
            )
        return CachedLogits(directory, _key(config, rows))
    if not finished:
        teacher()  # before its fingerprint: a hub id has files to be known by only once it was loaded
    key = _key(config, rows)
    if config.run.overwrite and section.cache_dir is None:
        _give_way(directory, key)
    if not finished:
        _check_room(directory, int(rows.lengths.sum()) * section.top_k * LEAST_BYTES)

    def logits(numbers: list[int]) -> Iterable[Tensor]:
        return teacher().row_logits(rows.batch(numbers), [int(rows.lengths[number]) for number in numbers])

    return write_cache(
        directory,
        range(len(rows)),
        logits,
        key,
        batch_size=config.data.eval_batch_size or config.data.batch_size,
        progress=progress_over("teacher logits"),
    )


def _key(config: Config, rows: NumberedRows) -> CacheKey:
    section, model = config.distill, config.model
    if section.teacher is not None:
        model = named_teacher(section, model)
    return CacheKey(fingerprint(find_model(model), model.revision), rows.checksum(), section.top_k, section.temperature)


def _give_way(directory: Path, key: CacheKey) -> None:
    """Remove a cache of another key, finished or not."""
    try:
        for record in (read_record(directory / UNFINISHED), read_record(directory / MANIFEST)):
            if record is not None:
                key.check(record, directory)
    except DataError:
        shutil.rmtree(directory)


def _check_room(directory: Path, wanted: int) -> None:
    """Refuse a cache that the disk cannot hold: the work of hours would end in the middle."""
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    written = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    free = shutil.disk_usage(there).free
    if wanted - written > free:
        raise DataError(
            f"cached logits of the training rows take {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where=str(directory),
            rule=f"{LEAST_BYTES} bytes for each of distill.top_k log-probabilities of each token, at least",
            fix=f"a smaller distill.top_k, distill.cache_dir=DIR on another disk; {ONLINE}",
        )
