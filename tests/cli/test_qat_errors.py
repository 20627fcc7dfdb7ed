"""Mistakes in sections within sections: the key, the value, the rule and the way out, before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.cli import main

RULES = 'method.rules={"*.down_proj": {%s}}'
MISTAKES: dict[str, tuple[str, ...]] = {
    "method.weight.formt=int4": ("method.weight.formt is no key of 'method.weight'", "did you mean 'format'?"),
    "method.weight.format=int44": ("method.weight.format='int44'", "did you mean 'int4'?", "int2 .. int8, ternary"),
    "method.weight=int4": ("method.weight='int4' is a section", "method.weight.format=int4"),
    "method.activation=int8": ("method.activation='int8' is a section", "method.activation.format=int8"),
    "method.activation.range=lerned": ("method.activation.range='lerned'", "'learned'", "dynamic (the default)"),
    "method.weight.group_size=0": ("method.weight.group_size=0", "whole number >= 1", "null (the default)"),
    "method.weight.calibrate=mse": ("method.weight: calibrate: mse with range: dynamic", "range: learned or static"),
    "method.weight.bounds=sigmoid": ("method.weight: bounds belong to range: static",),
    "method.kv_cache.granularity=per_token": ("method.kv_cache.granularity='per_token'", "say share: per_head"),
    "method.kv_cache.key.formt=int8": ("method.kv_cache.key.formt is no key", "did you mean 'format'?"),
    "method.kv_cache.key.format=int9": ("method.kv_cache.key.format='int9'", "did you mean 'int8'?"),
    "method.lora.rank=8": ("method.lora.rank is no key of 'method.lora'", "there is: lora_alpha, r"),
    "method.first_last=int88": ("method.first_last='int88'", "did you mean 'int8'?"),
    "method.start_step=-1": ("method.start_step=-1", "whole number >= 0"),
    "method.bits_schedule={0: int8, 10: int6}": ("bits_schedule ends with int6", "a later entry for int4"),
    "method.bits_schedule={0: int9}": ("method.bits_schedule=", "'int9'", "did you mean 'int8'?"),
    "method.init=gtpq": ("method.init='gtpq'", "did you mean 'gptq'?"),
    "method.init=gptq": ("init=gptq chooses scales, and range: dynamic", "method.weight.range=learned"),
    RULES % "weigth: {format: int8}": ("'weigth' of '*.down_proj' is no option", "did you mean 'weight'?"),
    RULES % "weight: {formt: int8}": ("*.down_proj: weight: 'formt' is no key", "did you mean 'format'?"),
    RULES % "weight: {format: int9}": ("*.down_proj: weight: format='int9'", "did you mean 'int8'?"),
    "method.rules={down_proj: int8}": ("method.rules", "'int8'", "other keys for layers by name"),
    "distill.top_k=5": ("distill.top_k without a loss to use it", "distill.loss=forward_kl"),
    "distill.layerwise.step=5": ("distill.layerwise.step is no key", "did you mean 'steps'?"),
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_told_with_its_way_out(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "method.name=qat", f"run.dir={tmp_path / 'run'}", word]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    for part in MISTAKES[word]:
        assert part in printed.err
    assert "pydantic" not in printed.err and "Value error" not in printed.err
    assert not (tmp_path / "run").exists()


def test_a_pattern_is_held_against_the_layers_of_the_model(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the dog sleeps on and the fox jumps over it\n" * 20)
    words = [f"model.path={tiny_llama_dir}", f"data.train={text}", "data.max_length=32", f"run.dir={tmp_path / 'run'}"]
    assert main(["fit", *words, "method.name=qat", "method.rules={down_proj: {weight: {format: int8}}}"]) == 2
    message = capsys.readouterr().err
    assert "rule 'down_proj' matches no layer" in message and "'*.down_proj' (which is " in message
    assert not (tmp_path / "run").exists()


def test_they_are_answered_at_once_and_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "begin = time.process_time()\n"
        "from qtrain.cli import main\n"
        "for word in sys.argv[1:]:\n"
        "    assert main(['fit', 'method.name=qat', word]) == 2\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "print(sorted(heavy), time.process_time() - begin)\n"
    )
    command = [sys.executable, "-c", program, *MISTAKES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    heavy, seconds = result.stdout.rsplit(maxsplit=1)
    assert heavy == "[]"
    # All of them in one process: each adds some 50 ms to the imports.
    assert float(seconds) < 2.0 + 0.1 * len(MISTAKES)


def test_help_lists_nested_keys_once_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("method  (name=qat)") + 1
    block = lines[begin : lines.index("", begin)]
    rows = {line.split()[0]: line for line in block[::2]}
    for key in ("weight", "weight.format", "weight.calibrate", "activation.format", "kv_cache.site", "lora.r"):
        assert f"method.{key}" in rows
    assert "method.kv_cache.key.format" in rows and "method.embedding.format" not in rows
    column = {len(line) - len(line[2 + len(path) :].lstrip()) for path, line in rows.items()}
    assert len(column) == 1
    assert "of the token embedding's rows; keys as those of method.weight" in " ".join(block[1::2])
    names = next(line for line in lines if line.split()[:1] == ["method.name"])
    assert "qlora|qat|" in names and names.endswith(" = qlora")
