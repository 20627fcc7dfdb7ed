"""kill -9 at random moments of `fit`, then ``run.resume=true``: is the end, to the bit, that of an undisturbed run?

    python benchmarks/kills.py [OUT.md] [kills=20] [writes=0] [seed=0]

Each kill has a run of its own, killed at a moment drawn from the whole length of an undisturbed run, its start
included, and gone on with by the same command; methods take turns. Compared are what was trained, byte by byte, the
last checkpoint (weights, optimizer, schedule, loops, random states), metrics.csv without the speed columns, and which
files there are. After each kill, before the resume, everything in sight is read: no file may be half of one. As many
kills as `writes` says come in the middle of a write that is drawn from all of them.

Nothing but imports happens before the forks, so that no thread of torch's is lost in them.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qtrain.training.fit  # noqa: F401  (what takes seconds to import is there before the forks)
from qtrain.callbacks.checkpoint_files import KEY, check, checkpoints, step_of
from qtrain.callbacks.trainable_checkpoint import read_checkpoint
from qtrain.cli import main as qtrain_main
from qtrain.console import hush
from qtrain.files import write_text
from qtrain.training.run_directory import RunDirectory

INT4 = "method.weight={format: int4, group_size: 32}"
METHODS = {
    "qlora": ("method.name=qlora", "method.r=4", "method.lora_dropout=0.2", "method.neftune_alpha=5"),
    "qat": ("method.name=qat", INT4),
    "peqa": ("method.name=peqa", "method.init=rtn", INT4),
}
STEPS, SAVE_EVERY = 12, 2


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Attributes:
        moment: seconds after the start, or the number of the write.
        length: seconds, or writes, of an undisturbed run.
        saved: steps that the newest checkpoint had behind it, 0 for none.
        differences: of the end from that of the undisturbed run.
    """

    method: str
    moment: float
    length: float
    saved: int
    differences: list[str]


def make_inputs(folder: Path) -> None:
    """A tiny model and some text."""
    words = ["the cat", "a dog", "my tree", "sees", "and then", "one", "of two", "rivers", "stands by"]
    chosen = random.Random(1)
    text = "".join(" ".join(chosen.choices(words, k=9)) + ".\n" for _ in range(240))
    (folder / "train.txt").write_text(text[:6000])
    (folder / "held_out.txt").write_text(text[6000:7500])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        eos_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")


def command(folder: Path, method: str, run: Path) -> list[str]:
    """Of `qtrain`: two micro-batches a step, a validation every third step, all kinds of random numbers."""
    return [
        *("fit", f"model.path={folder / 'model'}", f"data.train={folder / 'train.txt'}"),
        *(f"data.validation={folder / 'held_out.txt'}", "data.max_length=48", "data.batch_size=2"),
        *("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6", "trainer.limit_val_batches=2"),
        *(f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "trainer.accelerator=cpu", "optimizer.lr=1e-3"),
        *("optimizer.schedule=cosine", f"run.save_every={SAVE_EVERY}", f"run.dir={run}", *METHODS[method]),
    ]


def fork(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Run ``work`` in a process of its own, without a word; whether it came to its end.

    Raises:
        RuntimeError: it failed by itself.
    """
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            torch.set_num_threads(1)
            try:
                status = work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                status = 1
            os._exit(status or 0)
        status = wait(child, kill_after)
        log.seek(0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(log.read()[-3000:])
    return os.WIFEXITED(status)


def wait(child: int, kill_after: float | None) -> int:
    """Wait for a process, for no longer than that; its status."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitpid(child, 0)[1]


def dying(work: Callable[[], Any], last: int, count: Path) -> Callable[[], Any]:
    """``work`` that dies in its ``last``-th write, all of it written and nothing yet in its place.

    Args:
        count: a file that gets a byte for each.
    """
    sync = os.fsync

    def die(file: Any) -> None:
        with count.open("a") as counted:
            counted.write(".")
        if count.stat().st_size == last:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    def patched() -> Any:
        os.fsync = die  # type: ignore[assignment]
        return work()

    return patched


def figures(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without how fast it went."""
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("throughput/") and v} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def differences(one: Any, other: Any, name: str) -> list[str]:
    """Names of the leaves in which two trees of plain data differ."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, pair in pairs for found in differences(*pair, f"{name}[{place}]")]
    return [] if one == other else [f"{name} ({one!r:.60} and {other!r:.60})"]


def compare(run: Path, undisturbed: Path) -> list[str]:
    """In what two finished runs differ."""
    found = differences(content(run), content(undisturbed), "")
    names = [sorted(str(path.relative_to(at)) for path in at.rglob("*")) for at in (run, undisturbed)]
    return found + [f"files: {set(names[0]) ^ set(names[1])}" for _ in [0] if names[0] != names[1]]


def content(run: Path) -> dict[str, Any]:
    """All that must be the same, to the bit."""
    trained = RunDirectory(run).trained
    newest = RunDirectory(run).newest_checkpoint()
    assert trained is not None and newest is not None
    checkpoint = read_checkpoint(str(newest))
    fit = json.loads((run / "fit.json").read_text())
    timed = ("seconds", "per_second", "peak_gib", "mfu", "plan")
    return {
        trained.name: {path.name: parts(path) for path in sorted(trained.iterdir())},
        # Without the loop of `trainer.validate`, which a resumed run has no reason to enter before it trains.
        "checkpoint": {key: value for key, value in checkpoint.items() if key not in ("callbacks", "loops", KEY)},
        "loops": checkpoint["loops"]["fit_loop"],
        "random states": checkpoint[KEY]["random_states"],
        "metrics": figures(run),
        # "model" is what was said at the start: a resumed run reads a base that the first one made.
        "fit": {key: value for key, value in fit.items() if key != "model" and not any(word in key for word in timed)},
    }


def parts(path: Path) -> Any:
    """A file's bytes; of safetensors the header apart, since its writer puts metadata in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    length = int.from_bytes(data[:8], "little")
    return [json.loads(data[8 : 8 + length]), data[8 + length :]]


def look(run: Path) -> None:
    """Read all that is in sight; half of a file is an error here."""
    if not run.is_dir():
        return
    for path in checkpoints(run / "checkpoints"):
        check(path)
        read_checkpoint(str(path))
    for path in run.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            load_file(path)
    trained = RunDirectory(run).trained
    assert trained is None or (trained / "tokenizer.json").is_file(), f"{trained} is not whole"


def one_kill(folder: Path, method: str, length: float, chosen: random.Random, run: Path, *, write: bool) -> Kill:
    """Kill a run somewhere, look at what lies there, and go on with it."""
    work = partial(qtrain_main, command(folder, method, run))
    if write:
        moment: float = chosen.randint(1, int(length))
        assert not fork(dying(work, int(moment), run.with_suffix(".writes")))
    else:
        while fork(work, kill_after=(moment := chosen.uniform(0, length))):
            shutil.rmtree(run)  # it was faster this time
    look(run)
    newest = checkpoints(run / "checkpoints")
    saved = step_of(newest[-1]) if newest else 0
    fork(lambda: qtrain_main([*command(folder, method, run), "run.resume=true"]))
    return Kill(method, moment, length, saved, compare(run, folder / method))


def page(kills: list[Kill], words: list[str]) -> str:
    """The table of results."""
    equal, saved = Counter(k.method for k in kills if not k.differences), Counter(k.saved for k in kills)
    lines = [
        "# kill -9 at random moments, then run.resume=true\n",
        f"`{' '.join(['python benchmarks/kills.py OUT.md', *words])}`, {platform.machine()}, one thread, torch",
        f"{torch.__version__}. {' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}",
        f"\nA tiny Llama (2 layers, hidden 64), {STEPS} steps of 2 micro-batches, a checkpoint every {SAVE_EVERY}",
        "steps, a validation every 3.\n",
        "| method | kills | equal to the bit |",
        "|---|---|---|",
        *(f"| {m} | {sum(k.method == m for k in kills)} | {equal[m]} |" for m in METHODS),
        f"| **all** | {len(kills)} | {equal.total()} |",
        "\n| newest checkpoint when it was killed | kills |",
        "|---|---|",
        *(f"| {f'step {step}' if step else 'none'} | {count} |" for step, count in sorted(saved.items())),
        "",
        *(f"- {k.method}, killed at {k.moment:.2f}: {', '.join(k.differences)}" for k in kills if k.differences),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(words: list[str]) -> int:
    """Kill, resume, compare; 1 if anything differs."""
    hush()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    out = next((Path(word) for word in words if "=" not in word), None)
    chosen = random.Random(int(given.get("seed", "0")))
    count, writes = int(given.get("kills", "20")), int(given.get("writes", "0"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork(lambda: make_inputs(folder))
        lengths: dict[str, tuple[float, float]] = {}
        kills = []
        for number in range(count + writes):
            method, write = list(METHODS)[number % len(METHODS)], number >= count
            if method not in lengths:
                counted, begin = folder / "writes", time.monotonic()
                fork(dying(partial(qtrain_main, command(folder, method, folder / method)), 0, counted))
                lengths[method] = time.monotonic() - begin, counted.stat().st_size
                counted.unlink()
            length = lengths[method][write]
            kills.append(one_kill(folder, method, length, chosen, folder / f"{method}-{number}", write=write))
            told = ", ".join(kills[-1].differences) or "equal"
            at = f"in write {kills[-1].moment} of {length}" if write else f"at {kills[-1].moment:.2f} of {length:.2f} s"
            print(f"{method:<6} killed {at}, newest checkpoint {kills[-1].saved}: {told}", flush=True)
    equal = sum(not kill.differences for kill in kills)
    print(f"{equal} of {len(kills)} bit-equal")
    if out:
        write_text(out, page(kills, [word for word in words if "=" in word]))
    return int(equal < len(kills))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
