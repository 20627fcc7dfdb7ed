"""The benchmarks of kernels and of a compiled layer at a tiny size: twins alone, and the kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def bench(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--tiny", *map(str, words)]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=170)


def cells(file: Path) -> list[list[str]]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_twin_is_timed_and_a_table_that_is_there_stays(tmp_path: Path) -> None:
    from benchmarks.gpu.kernels import CASES

    (tmp_path / "table.md").write_text("annotated by hand")
    found = bench("--out", tmp_path / "table.md", TRITON_INTERPRET="0")
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "table.md").read_text() == "annotated by hand"
    rows = cells(tmp_path / "table-2.md")
    assert {row[0].split(":")[0] for row in rows} - {""} == set(CASES)
    for row in rows:
        assert bool(row[2]) != ("not here" in row[-1]), row
        assert row[2] or row[1] not in ("plain", "a copy of as many bytes")


def test_a_name_that_is_no_kernel_is_answered_with_those_that_are() -> None:
    found = bench("rms_nrom")
    assert found.returncode == 2 and "no kernel 'rms_nrom': adamw, adamw8" in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run compiled: make bench-gpu")
def test_kernels_give_what_their_twins_give(tmp_path: Path) -> None:
    """In the interpreter; what reads and writes over one operand is compared by its first run."""
    pytest.importorskip("triton", reason="CPU installs of torch come without triton")
    found = bench("--out", tmp_path / "table.md", TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout + found.stderr
    kernels = [row for row in cells(tmp_path / "table.md") if row[1] == "kernel"]
    absent = [row[0].partition(",")[0] for row in kernels if not row[2]]
    assert absent == ["fp8_product: torch._scaled_mm", "int8_matmul: bulk"], "these alone need more than Triton"
    apart = {row[0]: float(row[-1]) for row in kernels if row[2]}
    assert len(apart) >= 22 and max(apart.values()) < 1e-6, apart


def test_layers_compiled_fused_and_as_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled_layers", str(tmp_path / "table.md"), "--tiny"]
    command += ["--rounds", "1", "--backend", "aot_eager"]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170
    )
    assert found.returncode == 0, found.stdout + found.stderr
    rows = cells(tmp_path / "table.md")
    assert [row[0] for row in rows] == ["QLoRA NF4 r 64"] * 3 + ["QAT W4 g32"] * 3, found.stdout
    assert {row[1].partition(",")[0] for row in rows} == {"unfused", "fused"}
    assert [bool(row[5]) for row in rows] == [False, False, True] * 2
    assert all(float(row[2]) > 0 and float(row[-1]) < (1e-5 if not torch.cuda.is_available() else 0.1) for row in rows)
    assert "QKV, O and MLP fused over nf4" in (tmp_path / "table.md").read_text()


def test_where_the_host_is(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.host_time", str(tmp_path / "table.md")]
    command += ["1b:w4a8-int8", "--tiny", "--work", str(tmp_path / "work")]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170
    )
    assert found.returncode == 0, found.stdout + found.stderr
    rows = [row for row in cells(tmp_path / "table.md") if row[0] == "1b:w4a8-int8"]
    assert rows and all(float(number) > 0 for row in rows for number in row[3:6]), found.stdout


def test_what_a_layer_takes_the_host(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.host_layer", str(tmp_path / "table.md"), "peqa"]
    found = subprocess.run(
        [*command, "--layers", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (row,) = (row for row in cells(tmp_path / "table.md") if row[0] == "peqa")
    assert all(float(number) > 0 for number in row[1:]), found.stdout
