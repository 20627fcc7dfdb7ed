"""What a run trained, from its own file of tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qtrain.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; a pickle beside it is no substitute.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"what was trained cannot be read: {error}",
            where=str(path),
            rule="adapters, weights and scales are safetensors: pickle runs code",
            fix="run.resume=true writes it again from the newest checkpoint",
        ) from None
