"""The kernels without a GPU: the files here once more, in Triton's interpreter, which is chosen before imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__)
FILES = [path for path in sorted(HERE.parent.glob("test_*.py")) if path != HERE and "INTERPRETED" in path.read_text()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they run compiled")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="CPU installs of torch come without triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, FILES)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0 and len(FILES) >= 10, found.stdout + found.stderr
    assert " passed" in found.stdout and "skipped" not in found.stdout, "there each case is run"
