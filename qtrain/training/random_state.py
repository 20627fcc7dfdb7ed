"""The state of every random generator, as plain data: Lightning's checkpoints hold none of it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of torch (CPU and this process' CUDA device), numpy and Python, loadable with ``weights_only=True``."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],  # type: ignore[union-attr]
        "python": list(random.getstate()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` returned; the CUDA state where there is such a device."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
