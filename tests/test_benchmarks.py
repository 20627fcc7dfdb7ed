"""The driver of the GPU benchmarks: its plan, a row at a tiny size, ratios of a sitting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def bench(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bench_gpu", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_plan_takes_the_peers_of_a_chosen_case_along() -> None:
    found = bench("qlora-7b:ours-full", "65b", "--plan", "--gpus", "0,1")
    assert found.returncode == 0
    rows = [line.split()[0] for line in found.stdout.splitlines()]
    asked = ["qlora-7b", "peft-full", "ours-full", "unsloth-full"]
    assert rows == [*asked, "65b", "qlora", "peqa-row", "peqa-g128", "together"]
    seconds = {line.split()[0]: int(line.split()[1]) for line in found.stdout.splitlines()}
    # The row that needs no checkpoint begins at once, the other on the second GPU.
    assert seconds["qlora-7b"] < seconds["together"] < seconds["qlora-7b"] + seconds["65b"]


def test_a_name_that_is_no_row_is_answered_with_those_that_are() -> None:
    found = bench("qlora-8b", "--plan")
    assert found.returncode == 2
    assert "no row 'qlora-8b': qlora-7b, fp8" in found.stderr


def test_a_tiny_row_is_measured_and_drawn(tmp_path: Path) -> None:
    found = bench("65b:peqa-row", "--tiny", "--out", tmp_path / "out", "--work", tmp_path / "work")
    assert found.returncode == 0
    (line,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert line["tokens_per_second"] > 0 and (line["row"], line["case"]) == ("65b", "peqa-row")
    assert any("int4 symmetric, per_channel" in said for said in line["said"])
    assert "| peqa-row |" in (tmp_path / "out" / "table.md").read_text()


def test_ratios_are_those_of_one_sitting_on_one_gpu(tmp_path: Path) -> None:
    def line(case: str, sitting: str, gpu: str, speed: float, **more: Any) -> str:
        known = {"row": "qlora-7b", "case": case, "sitting": sitting, "gpu": gpu, "device": "a GPU", "said": [case]}
        return json.dumps({**known, "tokens_per_second": speed, "tflops": 1.0, "peak_gib": speed / 1000, **more})

    results = tmp_path / "results.jsonl"
    lines = [
        line("ours-full", "1", "0", 3000.0),
        line("unsloth-full", "1", "0", 2000.0),
        line("ours-full", "2", "0", 9000.0),
        line("unsloth-full", "2", "1", 1000.0),  # another GPU
        json.dumps({"row": "qlora-7b", "case": "peft-full", "sitting": "2", "gpu": "0", "not_here": "no peft"}),
    ]
    results.write_text("\n".join(lines))
    found = bench("--render", results, "--table", tmp_path / "table.md")
    assert found.returncode == 0
    cells = [[cell.strip() for cell in line.split("|")] for line in found.stdout.splitlines() if "unsloth-full" in line]
    assert cells[0][1:3] == ["ours-full", "3,000"] and cells[0][5:10] == [
        "unsloth-full",
        "1.50",
        "≥ 1.15",
        "1.50",
        "≤ 1.00",
    ]
    assert "- peft-full: no peft" in found.stdout
    drawn = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").write_text("annotated by hand")
    for name in ("table-2.md", "table-3.md"):
        assert bench("--render", results, "--table", tmp_path / "table.md").returncode == 0
        assert (tmp_path / name).read_text() == drawn
    assert (tmp_path / "table.md").read_text() == "annotated by hand"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "result", "said"),
    [("3", "ended after 3 s", "Fatal Python error: Aborted"), ("200", " to ", "trained after")],
)
def test_rows_of_two_processes(tmp_path: Path, limit: str, result: str, said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.two_gpus", str(tmp_path / "OUT.md"), "--tiny", "--rows", "qlora-70b"]
    command += ["--work", str(tmp_path / "work"), "--limit", limit]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    (row,) = (line for line in (tmp_path / "OUT.md").read_text().splitlines() if line.startswith("| qlora-70b"))
    assert result in row
    assert said in (tmp_path / "OUT.log").read_text()
