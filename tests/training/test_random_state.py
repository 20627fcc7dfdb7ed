"""All generators go on where they were, after a trip through a plain checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtrain.training.random_state import random_state, set_random_state


def draws() -> dict[str, Any]:
    return {
        "torch": torch.randn(4).tolist() + torch.rand(3).tolist(),
        "numpy": np.random.randn(3).tolist() + np.random.rand(3).tolist(),
        "python": [random.random(), random.gauss(0, 1), random.randrange(10**9)],
    }


def stirred(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    draws()  # an odd number of normals: one is kept back in numpy and in Python


def test_the_next_draws_are_the_same_after_a_checkpoint(tmp_path: Path) -> None:
    stirred(1)
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    stirred(2)
    assert draws() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    found = draws()
    assert found == expected


def test_asking_for_the_state_draws_nothing() -> None:
    stirred(3)
    first = random_state()
    second = random_state()
    assert torch.equal(first["torch"], second["torch"])
    assert (first["numpy"], first["python"]) == (second["numpy"], second["python"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be taken there")
def test_the_state_of_a_gpu_is_left_alone_where_there_is_none() -> None:
    stirred(4)
    state = random_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    expected = draws()
    set_random_state(state)
    assert draws() == expected
