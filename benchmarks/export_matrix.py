"""Every training method in every export format: exact, refused with the reason, or lossy because that was asked for.

    python benchmarks/export_matrix.py MODEL TEXT OUT.md [METHOD ...] [--formats FORMAT ...] [--python FORMAT=PYTHON ..]

Each method trains two steps: what is exact does not depend on how long it trained. Then `qtrain export` writes each
format, reads the files back, counts the codes that differ from the training's, and runs the result in the format's
consumer: perplexity, top-1, 64 greedy tokens. ``--python`` names the interpreter that has a format's consumer. OUT.json
keeps each cell that was measured; it is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ["compressed-tensors", "gptq", "awq", "torchao", "gguf", "bitsandbytes", "merged"]
QAT = ["method.name=qat"]
PEQA = ["method.name=peqa", "method.init=rtn"]
A8 = "method.activation={format: int8, convention: compressed-tensors}"  # absmax / 127.5, as transformers computes it
METHODS: dict[str, list[str]] = {
    "QAT W4 g64": [*QAT, "method.weight={format: int4, group_size: 64}"],
    "QAT W4 g32": [*QAT, "method.weight={format: int4, group_size: 32}"],
    "QAT W4 g32, zero points": [*QAT, "method.weight={format: int4, group_size: 32, symmetric: false}"],
    "QAT W8A8": [*QAT, "method.weight.format=int8", A8],
    "QAT W8A8, torchao's sums": [
        *(*QAT, "method.weight.format=int8", "method.activation={format: int8, convention: torchao}"),
        "method.kernels=int8",
    ],
    "QAT W4A8": [*QAT, "method.weight.format=int4", A8],
    "QAT W4A8KV8": [
        *(*QAT, "method.weight.format=int4", A8),
        "method.kv_cache={format: int8, share: per_head}",
    ],
    "QAT FP8": [*QAT, "method.weight.format=fp8_e4m3", "method.activation.format=fp8_e4m3"],
    "QAT ternary g64": [*QAT, "method.weight={format: ternary, group_size: 64}", "export.format=merged"],
    "fq(W + BA) W4 g64": [*QAT, "method.weight={format: int4, group_size: 64}", "method.lora={r: 8}"],
    "PEQA W4 g64": [*PEQA, "method.weight={format: int4, group_size: 64, symmetric: false}"],
    "PEQA W3 g64": [*PEQA, "method.weight={format: int3, group_size: 64}"],
    "PEQA W2 g64": [*PEQA, "method.weight={format: int2, group_size: 64, symmetric: false}"],
    "SpQR W3 g64": ["quantize", "method.name=ptq", "method.init=spqr", "method.weight={format: int3, group_size: 64}"],
    "QLoRA NF4": ["method.name=qlora", "method.r=8"],
}
ASKED = {("QLoRA NF4", "gguf"): ["export.quantize=q8_0"]}
"""Keys without which a cell would be plain 16 bits."""


class Done(NamedTuple):
    """A command's exit status, both its streams, and export.json."""

    code: int
    text: str
    facts: dict[str, Any] = {}


FAILED = {"status": "failed"}


def command(python: str, *lines: list[str]) -> list[Done]:
    """Exit status, and what was written to both streams, of each command line; all in one process of ``python``."""
    environment = os.environ | {"COLUMNS": "400", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    child = [python, "-W", "ignore", __file__, "--child", json.dumps(lines)]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, env=environment)
    return [Done(*it) for it in json.loads(done.stdout.splitlines()[-1])]


def run_here(lines: list[list[str]]) -> list[Done]:
    """``command``'s child."""
    from qtrain.cli import main as qtrain

    found = []
    for words in lines:
        text = StringIO()
        with redirect_stdout(text), redirect_stderr(text):
            try:
                code = qtrain(words)
            except SystemExit as stop:
                code = stop.code
            except Exception:  # noqa: BLE001 - a cell that failed is a row of the table
                code = 1
                text.write(traceback.format_exc())
        facts = {}
        if words[0] == "export" and not code:
            given = dict(word.split("=", 1) for word in words[1:])
            facts = json.loads((Path(given["run.dir"]) / "export.json").read_text(encoding="utf-8"))
            facts = facts.get(given["export.format"], facts)
            shutil.rmtree(facts["directory"])
        found.append(Done(int(code or 0), text.getvalue(), facts))
        print(f"{' '.join(words)[:150]}: {code}", file=sys.stderr, flush=True)
    return found


def train(asked: argparse.Namespace, name: str) -> Path:
    """The run of a method; two steps where it is not there yet."""
    run = asked.work / name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
    if not (run / "fit.json").exists() and not (run / "quantize.json").exists():
        words = list(METHODS[name])
        verb = words.pop(0) if words[0] == "quantize" else "fit"
        words += [f"model.path={asked.model}", f"data.train={asked.text}", f"data.validation={asked.text}"]
        words += ["data.format=text", f"data.max_length={asked.length}", "data.batch_size=1"]
        words += ["method.calibration_rows=4"] if "qlora" not in " ".join(words) else []
        if verb == "fit":
            words += ["trainer.max_steps=2", "trainer.limit_val_batches=1", "optimizer.lr=1e-4"]
        (done,) = command(sys.executable, [verb, *words, f"run.dir={run}", "run.overwrite=true"])
        if done.code:
            raise SystemExit(f"{name}: {done.text[-2000:]}")
    return run


def cell(done: Done) -> dict[str, Any]:
    """What became of one export."""
    if done.code == 2 and "error" in done.text:
        lines = [line.strip() for line in done.text.splitlines() if line.strip()]
        first = next(at for at, line in enumerate(lines) if line.startswith("error"))
        return {"status": "refused", "why": " ".join(lines[first : first + 3])[:400]}
    if done.code:
        return {"status": "failed", "why": done.text[-1500:]}
    return {"status": "written", "facts": done.facts}


def cells(asked: argparse.Namespace, name: str, run: Path, forms: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The exports of one method, those of one interpreter in one process."""
    pythons = dict(pair.split("=", 1) for pair in asked.python)
    common = [f"run.dir={run}", f"export.evaluate_windows={asked.windows}"]
    for python in dict.fromkeys(pythons.get(form, sys.executable) for form in forms):
        own = [form for form in forms if pythons.get(form, sys.executable) == python]
        lines = [["export", *common, f"export.format={form}", *ASKED.get((name, form), [])] for form in own]
        for form, done in zip(own, command(python, *lines), strict=True):
            yield form, cell(done)


def shown(found: dict[str, Any]) -> str:
    """A cell in words: exact with greedy tokens and the KL of logits, lossy, refused or failed."""
    if found["status"] != "written":
        return found["status"]
    verified = found["facts"].get("verified", {})
    cells = verified.get("found", {})
    if not verified.get("passed"):
        return "FAILED"
    if cells.get("codes") not in ("0", None) or verified.get("lossy"):
        kind = "16 bits" if cells.get("codes") == "-" and not verified.get("lossy") else "lossy, asked for"
    else:
        kind = "exact"
    drift = "" if found["facts"].get("kl") is None else f", KL {found['facts']['kl']:.0e}".replace("KL 0e+00", "KL 0")
    return f"{kind}{drift}, {cells.get('greedy', '-')}"


def table(known: dict[str, Any], asked: argparse.Namespace) -> str:
    """Methods by formats, then who read them and why the others were refused."""
    names = list(dict.fromkeys(key.partition(" | ")[0] for key in known))
    rows = [f"| | {' | '.join(asked.formats)} |", "|---" * (len(asked.formats) + 1) + "|"]
    for name in names:
        cells = [shown(known[key]) if (key := f"{name} | {form}") in known else "" for form in asked.formats]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    readers = {
        form: sorted(
            {
                it["facts"].get("measured_in") or "-"
                for key, it in known.items()
                if key.endswith(f"| {form}") and it["status"] == "written"
            }
        )
        for form in asked.formats
    }
    rows += ["", *(f"- {form} was read by {', '.join(found)}" for form, found in readers.items() if found), ""]
    rows += [f"- {key.replace(' | ', ', ')}: {it['why']}" for key, it in known.items() if it["status"] == "refused"]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "out"):
        parser.add_argument(name)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--python", nargs="+", default=[])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/export_matrix"))
    asked = parser.parse_args()
    out = Path(asked.out)
    store = out.with_suffix(".json")
    known: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for name in asked.methods:
        missing = [it for it in asked.formats if known.get(f"{name} | {it}", FAILED)["status"] == "failed"]
        for form, found in cells(asked, name, train(asked, name), missing) if missing else ():
            known[f"{name} | {form}"] = found
            store.write_text(json.dumps(known, indent=1), encoding="utf-8")
            out.write_text(table(known, asked), encoding="utf-8")
            print(name, "|", form, "|", shown(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(run_here(json.loads(sys.argv[2]))))
    else:
        main()
