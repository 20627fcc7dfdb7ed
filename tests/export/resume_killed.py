"""Run in a process of its own: export tiny models, killed at random moments and called again, and tell what came of it.

Nothing but imports happens before the forks, so that no thread of torch's is lost in them.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.export.config import FORMATS
from qtrain.methods.method import build_method
from qtrain.methods.peqa.config import PeqaOptions
from qtrain.modules.deployed import DeployedModel, DeployedTensor
from qtrain.ptq.activation_stats import Calibration
from qtrain.registry import resolve

CASES: dict[str, dict[str, Any]] = {
    "compressed-tensors": {},
    "gptq": {},
    "awq": {},
    "torchao": {},
    "merged": {},
    "gguf": {},
    "calibrated": {"format": "compressed-tensors", "rounding": "gptq"},
    "unweighed": {"format": "gptq", "rounding": "nearest", "calibration_rows": 0, "symmetric": False},
}


def models(chosen: bool) -> tuple[DeployedModel, Calibration | None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).eval()
    if chosen:
        rows = [torch.arange(32).unsqueeze(0) * 7 % 256]
        linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        tensors = [
            DeployedTensor(name, tuple(value.shape), name in linears, value.detach)
            for name, value in model.state_dict().items()
        ]
        return DeployedModel(config, None, lambda: iter(tensors), torch.float32), Calibration(model, rows)
    method = build_method(
        PeqaOptions.model_validate({"name": "peqa", "init": "rtn", "weight": {"format": "int4", "group_size": 32}})
    )
    method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    return method.deployed(model, dtype=torch.float32), None


def export(case: str, directory: Path, resume: str | None, slow: Callable[[], None]) -> None:
    options = FORMATS.get(CASES[case].get("format", case)).model_validate(
        {"format": case, "max_shard_size": "20KB", **CASES[case]}
    )
    plain, calibration = models(bool(CASES[case]))

    def slowly(compute: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            slow()
            return compute()

        return run

    def tensors() -> Iterator[DeployedTensor]:
        for t in plain.tensors():
            yield replace(t, value=slowly(t.value), record=t.record and slowly(t.record))

    calibration = calibration if getattr(options, "calibration_rows", 0) else None
    write = resolve(options.implementation)
    write(
        replace(plain, tensors=tensors),
        options,
        directory,
        tokenizer=None,
        facts={},
        calibration=calibration,
        resume=resume,
    )


def attempt(case: str, directory: Path, weights: int | None) -> tuple[bool, int]:
    """One call in a fork, killed while it computes another weight than so many; whether it came to its end, and how
    many it computed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def slow() -> None:
            os.write(writing, b".")
            time.sleep(0.002)

        try:
            export(case, directory, "key", slow)
            os._exit(0)
        except BaseException as error:  # the parent tells it
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(writing)
    computed = 0
    while (weights is None or computed < weights) and os.read(reading, 1):
        computed += 1
    if computed == weights:
        time.sleep(random.uniform(0.0, 0.003))
        os.kill(child, signal.SIGKILL)
    while more := os.read(reading, 4096):
        computed += len(more)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{case}: the export failed")
    return os.WIFEXITED(status), computed


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def main(folder: Path, seed: int) -> None:
    random.seed(seed)
    told: dict[str, Any] = {}
    for case in CASES:
        at = folder / case / "out"
        at.mkdir(parents=True)
        (at / "earlier").write_text("export")
        kills, computed, seen = 0, [], True
        for _ in range(4):
            done, count = attempt(case, at, random.randint(1, 20))
            computed.append(count)
            if done:
                break
            kills += 1
            seen &= content(at) == {"earlier": b"export"}
        if not done:
            done, count = attempt(case, at, None)
            computed.append(count)
        told[case] = {"kills": kills, "computed": computed, "earlier stayed": seen, "beside": os.listdir(at.parent)}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
