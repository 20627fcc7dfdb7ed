"""Sizes of files as people write them."""

from __future__ import annotations

import re

from qtrain.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LARGEST_SHARD = 5 * 10**9
"""What hubs and their caches take as one file without special care."""


def parse_size(text: str) -> int:
    """Bytes of ``1GB``, ``500 MB``, ``2GiB``.

    Raises:
        ConfigError: no such size, or a file that is too large for one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ConfigError(
            f"export.max_shard_size={text!r} is no size", rule="a number and B, KB, MB, GB, MiB or GiB", fix="1GB"
        )
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size > LARGEST_SHARD:
        raise ConfigError(
            f"export.max_shard_size={text!r}",
            rule="a file of weights has at most 5 GB",
            fix="export.max_shard_size=5GB",
        )
    return size
