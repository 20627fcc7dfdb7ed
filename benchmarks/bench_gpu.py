"""Our speed and memory beside every peer's on a GPU, row by row.

    python -m benchmarks.bench_gpu ROW [ROW ...] [--gpus 0,1] [--limit 1500] [--out DIR] [--table FILE.md]
    python -m benchmarks.bench_gpu ROW ... --plan      what that would run, and how long it takes on an H200
    python -m benchmarks.bench_gpu --render DIR/results.jsonl ... --table FILE.md

A ROW is a name that --plan lists, ROW:PATTERN,PATTERN for some of its cases (their peers come along), or all. Each case
is a process of its own; the cases of a row run one after the other on one GPU, rows beside each other on several. Every
result is written to DIR/results.jsonl as it comes, so that what ends early keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import START, Case, Row, chosen
from benchmarks.gpu.table import read_lines, render
from benchmarks.result_file import free_name

ROOT = Path(__file__).parent.parent
PREFIX = "RESULT "
MAKE_CHECKPOINT = 60
"""Seconds that 13.5 GB of weights take, on no GPU."""


class Sitting:
    """Runs rows on some GPUs until the time is over.

    Args:
        rows: in the order in which they are begun.
        asked: of the command line.
    """

    def __init__(self, rows: Sequence[Row], asked: argparse.Namespace) -> None:
        self.rows, self.asked = list(rows), asked
        self.name = datetime.now().isoformat(timespec="seconds")
        self.end = time.monotonic() + asked.limit
        self.lock = threading.Lock()
        self.results: Path = asked.out / "results.jsonl"
        self.log: Path = asked.out / "log.txt"

    def run(self) -> None:
        """All rows, as far as the time goes."""
        self.asked.out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(self.asked.gpus) + 1) as threads:
            files = threads.submit(self._make_files) if any(row.reads_checkpoint for row in self.rows) else None
            for worker in [threads.submit(self._work, gpu, files) for gpu in self.asked.gpus]:
                worker.result()

    def _work(self, gpu: str, files: Future[str | None] | None) -> None:
        while (row := self._next(files)) is not None:
            missing = files.result() if files is not None and row.reads_checkpoint else None
            for case in row.cases:
                self._store(row, case, gpu, {"failed": missing} if missing else self._run(row, case, gpu))

    def _next(self, files: Future[str | None] | None) -> Row | None:
        """The first that can begin now; else the first."""
        with self.lock:
            ready = [row for row in self.rows if not row.reads_checkpoint or (files is not None and files.done())]
            row = next(iter(ready or self.rows), None)
            if row is not None:
                self.rows.remove(row)
            return row

    def _make_files(self) -> str | None:
        """What failed, if it did."""
        line = self._process(
            ["benchmarks.gpu.checkpoint"], "checkpoint", {"CUDA_VISIBLE_DEVICES": ""}, 4 * MAKE_CHECKPOINT
        )
        return f"checkpoint: {line['failed']}" if "failed" in line else None

    def _run(self, row: Row, case: Case, gpu: str) -> dict[str, Any]:
        left = self.end - time.monotonic()
        if left < (START if self.asked.tiny else 0.7 * case.seconds):
            return {"not_run": f"{left:.0f} s left, it takes {case.seconds:.0f}"}
        words = [f"benchmarks.gpu.{case.script}", case.word or case.name]
        at_most = min(left, self.asked.run_limit)
        return self._process(words, f"{row.name} {case.name}", {"CUDA_VISIBLE_DEVICES": gpu}, at_most)

    def _process(self, words: Sequence[str], title: str, environment: dict[str, str], limit: float) -> dict[str, Any]:
        command = [sys.executable, "-m", *words, "--work", str(self.asked.work)]
        command += ["--tiny"] if self.asked.tiny else []
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        begin = time.monotonic()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # to be ended with all that it started
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
            output.seek(0)
            text = output.read()
        seconds = time.monotonic() - begin
        with self.lock, self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n==== {title}, {seconds:.0f} s, exit status {status}\n{text[-40000:]}\n")
        lines = [line for line in text.splitlines() if line.startswith(PREFIX)]
        found: dict[str, Any] = json.loads(lines[-1].removeprefix(PREFIX)) if lines else {}
        if status is None and not lines:
            found = {"failed": f"ended after {limit:.0f} s"}
        elif status and not lines:
            said = [line for line in text.splitlines() if line.strip()]
            found = {"failed": f"exit status {status}: {said[-1][:300] if said else 'nothing said'}"}
        return found | {"wall_seconds": round(seconds, 1)}

    def _store(self, row: Row, case: Case, gpu: str, found: dict[str, Any]) -> None:
        found |= {"row": row.name, "case": case.name, "gpu": gpu, "sitting": self.name, "tiny": self.asked.tiny}
        why = found.get("not_run") or found.get("not_here") or found.get("failed")
        shown = why or f"{found['tokens_per_second']:,.0f} tokens/s, {found['peak_gib']} GiB"
        print(f"{row.name:<13}{case.name:<32}GPU {gpu}  {found.get('wall_seconds', 0):>5.0f} s  {shown}", flush=True)
        if "not_run" in found:
            return
        with self.lock, self.results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def plan(rows: Sequence[Row], gpus: int) -> str:
    """What runs, and how long it is expected to take on H200s."""
    lines = []
    for row in rows:
        lines.append(f"{row.name:<14}{row.seconds:>6.0f} s  {row.title}")
        lines += [f"    {case.name:<30}{case.seconds:>6.0f} s" for case in row.cases]
    ends = [0.0] * gpus
    made = float(MAKE_CHECKPOINT)
    waiting = list(rows)
    while waiting:
        soonest = ends.index(min(ends))
        ready = [row for row in waiting if not row.reads_checkpoint or ends[soonest] >= made]
        row = (ready or waiting)[0]
        waiting.remove(row)
        ends[soonest] = max(ends[soonest], made if row.reads_checkpoint else 0) + row.seconds
    lines.append(f"{'together':<14}{max(ends):>6.0f} s on {gpus} GPU{'s' if gpus > 1 else ''}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0"], help="by number: 0,1")
    parser.add_argument("--limit", type=float, default=3600, help="seconds in all; no case begins that would pass it")
    parser.add_argument("--run-limit", type=float, default=300, help="seconds of a case")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu"), help="results.jsonl, log.txt, table.md")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qtrain-bench", help="16 GB")
    parser.add_argument("--table", type=Path, help="where the table goes, -2 behind the name of one that is there")
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE", help="run nothing, draw these results")
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    asked = parser.parse_args()
    try:
        rows = chosen(asked.rows or ["all"])
    except ValueError as error:
        parser.error(str(error))
    if asked.plan:
        print(plan(rows, len(asked.gpus)))
        return 0
    if not asked.render:
        Sitting(rows, asked).run()
    text = render(read_lines(asked.render or [asked.out / "results.jsonl"]))
    table: Path = free_name(asked.table) if asked.table else asked.out / "table.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
