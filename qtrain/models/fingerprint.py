"""Which base an adapter belongs to, as a short hash of the base's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qtrain.models.source import ModelSource

BLOCK = 64 * 1024
BLOCKS = 64


def fingerprint(source: ModelSource, revision: str | None = None) -> str:
    """SHA-256 over the sizes of the weight files and 64 blocks of 64 KiB of each, evenly spread.

    Sampled, since hashing a 7B checkpoint whole takes 15 s at each start; another model, revision or fine-tune
    differs in every block. A hub id that lies in no local cache is hashed by name and revision.
    """
    digest = hashlib.sha256()
    if source.kind == "hub":
        files = _cached(source.location, revision)
        if not files:
            return "hub:" + hashlib.sha256(f"{source.location}@{revision}".encode()).hexdigest()[:32]
    else:
        path = Path(source.location)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as stream:
            for index in range(BLOCKS):
                stream.seek(max(0, size - BLOCK) * index // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:32]


def _cached(hub_id: str, revision: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache  # 0.5 s, and only a hub id needs it

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return sorted(Path(config).parent.glob("*.safetensors")) if isinstance(config, str) else []
