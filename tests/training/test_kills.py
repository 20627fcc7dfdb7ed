"""kill -9 at a random moment, or in the middle of a write, then run.resume=true: the end is the same to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_killed_runs_end_where_undisturbed_ones_do() -> None:
    """A kill for each method, and one more for each in a write: of those within training, by the seed."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "kills=3", "writes=3", "seed=33"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.endswith("6 of 6 bit-equal\n"), result.stdout + result.stderr
    assert result.returncode == 0
