"""README.md says nothing that does not run, names nothing that does not exist, and leaves nothing out."""

from __future__ import annotations

import os
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

import qtrain
from qtrain.cli import main
from qtrain.config.compose import load_recipe, recipe_names
from qtrain.config.schema import Config, VisionConfig
from qtrain.config.trainer_args import trainer_arguments
from qtrain.data.formats.registry import FORMATS as DATA_FORMATS
from qtrain.export.config import FORMATS as EXPORT_FORMATS
from qtrain.export.config import ExportSection
from qtrain.methods.config import METHODS, MethodSection
from qtrain.section import Section
from qtrain.verbs.table import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = ROOT / "recipes" / "data"

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SUBSTITUTIONS = {
    r"max_steps=\d+": "max_steps=2",
    r"every_n_train_steps=\d+": "every_n_train_steps=1",
    r"max_new_tokens=\d+": "max_new_tokens=4",
    r"generate_data\.tokens=\d+": "generate_data.tokens=4096",
}
"""What is smaller here than in the README, besides the model, which is the tiny Llama."""
ADDED = {
    "run.resume=true": "trainer.max_steps=3",
    "generate": "generate.max_new_tokens=4",
    "recipe=llm_qat_llama": "distill.layerwise.steps=2",
    "recipe=ptq_gptq": "method.weight.group_size=32",  # the tiny Llama's rows are 64 wide
}
"""Words that a command with this word is given on top: without the first, a finished run has nowhere to go on to."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line of the README that its text begins at."""

    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], README[: m.start(2)].count("\n") + 1) for m in found]


def commands(block: Block) -> list[str]:
    return block.text.replace("\\\n", " ").splitlines()


def inline_code() -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def table(first_header: str) -> list[list[str]]:
    """The rows of the table whose first header is this, as the cells stand."""
    lines = README.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def names(first_header: str) -> list[str]:
    """The first code span of each row."""
    return [re.findall(r"`([^`]+)`", row[0])[0] for row in table(first_header)]


def all_names(first_header: str) -> list[str]:
    """Every code span of the first cells."""
    return [name for row in table(first_header) for name in re.findall(r"`([^`]+)`", row[0])]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with the files that the README's reader is taken to have."""
    chats = (DATA / "demo_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(chats[:24]), encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("".join(chats[24:32]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(chats[32:40]), encoding="utf-8")
    notes = [line for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines() if line]
    (tmp_path / "notes.txt").write_text("\n".join(notes), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    with mock.patch.dict(os.environ):
        yield tmp_path
    torch.set_float32_matmul_precision(precision)


# Libraries' own, in the reader's code; the command line silences them for itself.
@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_blocks_run_one_after_the_other(
    workshop: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, object] = {}
    for block in blocks():
        small = block.text.replace(MODEL, str(tiny_llama_dir))
        for pattern, value in SUBSTITUTIONS.items():
            small = re.sub(pattern, value, small)
        if block.language == "python":
            # Empty lines first, so that a traceback names the README's own lines.
            exec(compile("\n" * (block.line - 1) + small, str(ROOT / "README.md"), "exec"), namespace)
            continue
        assert block.language == "bash", f"README.md:{block.line}: blocks are bash or python"
        for command in commands(Block("bash", small, block.line)):
            run_command(command, capsys)
    written = torch.load("checkpoints/step-000002.ckpt", weights_only=True)
    assert written["state_dict"] and all("lora_" in name for name in written["state_dict"])
    assert Path("adapter", "adapter_model.safetensors").is_file()
    assert list(Path("runs", "tracked", "wandb").glob("offline-run-*"))
    for name in names("path"):
        path = name.replace("FORMAT", "compressed-tensors")
        if path != "samples.jsonl":  # where run.samples are given
            assert (workshop / "runs" / "chats" / path).exists(), f"runs/chats/{path}"


def run_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    program, *words = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words and set(words) <= set(targets), command
    elif program == "pip":
        assert words == ["install", "."] and (ROOT / "pyproject.toml").is_file()
    elif program == "vllm":
        assert words[0] == "serve" and Path(words[1], "config.json").is_file(), command
    else:
        assert program == "qtrain", command
        status = main([*words, *(more for word, more in ADDED.items() if word in words)])
        assert status == 0, f"{command}\n{capsys.readouterr().err}"


def test_tables_name_all_there_is_and_nothing_else() -> None:
    assert names("verb") == VERBS.names()
    assert sorted(all_names("recipe")) == recipe_names()
    assert sorted(names("`data.format`")) == sorted(DATA_FORMATS.names())
    assert names("`export.format`")[0] == ExportSection.model_fields["format"].default
    assert sorted(names("`export.format`")) == sorted(EXPORT_FORMATS.names())


def test_each_method_stands_there_with_each_of_its_bases_and_keys() -> None:
    written = [(row[0].strip("`"), row[1].split()[0].strip("`")) for row in table("`method.name`")]
    assert {method for method, _ in written} == set(METHODS.names())
    for method in METHODS.names():
        fields = METHODS.get(method).model_fields
        bases = list(typing.get_args(fields["base"].annotation)) if "base" in fields else ["-"]
        assert [base for name, base in written if name == method] == bases
        own = fields.keys() - MethodSection.model_fields.keys()
        unnamed = [key for key in own if not any(re.search(rf"\b{key}\b", code) for code in inline_code())]
        assert not unnamed


def test_optimizers_are_all_there() -> None:
    optimizers = typing.get_args(section_class("optimizer").model_fields["name"].annotation)
    assert not set(optimizers) - set(inline_code())


SECTIONS = [name for name, info in Config.model_fields.items() if name not in ("task", "recipe", "trainer")]


def section_class(section: str) -> type[Section]:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def keys_of(section: str) -> set[str]:
    if section == "method":
        return {key for name in METHODS.names() for key in METHODS.get(name).model_fields}
    if section == "export":
        return {key for name in EXPORT_FORMATS.names() for key in EXPORT_FORMATS.get(name).model_fields}
    keys = set(section_class(section).model_fields)
    other = VisionConfig.model_fields.get(section)
    if other and isinstance(other.annotation, type) and issubclass(other.annotation, Section):
        keys |= set(other.annotation.model_fields)
    return keys


def test_keys_exist() -> None:
    found = re.findall(rf"(?<![\w/.])({'|'.join([*SECTIONS, 'trainer'])})\.([a-z_]+)(?!\w|\()", README)
    checked = 0
    for section, key in found:
        if key in ("json", "jsonl"):
            continue
        known = set(trainer_arguments()) if section == "trainer" else keys_of(section)
        if (section, key) not in {("trainer", "fit"), ("trainer", "strategy"), ("data", "summary")}:
            assert key in known, f"{section}.{key}"
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("code", [code for code in inline_code() if re.match(r"[a-z_]+\.[a-z_]+=\S", code)])
def test_overrides_in_the_text_compose(code: str) -> None:
    words = re.split(r"\s+(?=[a-z_]+\.[a-z_]+=)", code)
    config = load_recipe(None, *words)
    for word in words:
        section, key = word.partition("=")[0].split(".")
        assert section == "trainer" or hasattr(getattr(config, section), key)


def test_python_names_in_the_text_exist() -> None:
    for code in inline_code():
        if re.fullmatch(r"qtrain(\.\w+)+", code):
            name = code.removeprefix("qtrain.")
            assert name in qtrain.__all__ or import_module(code), code
    for name in import_module("qtrain.callbacks").__all__:
        assert hasattr(import_module("qtrain.callbacks"), name)
    for name in ("TrainableCheckpoint", "Throughput", "NanGuard", "SampleGenerations", "QuantizationAwareTraining"):
        assert name in inline_code() and name in import_module("qtrain.callbacks").__all__


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).exists(), target


def test_it_is_short_and_knows_no_machine() -> None:
    assert len(README.splitlines()) < 400
    assert not re.search(r"(?<![\w.])/(home|work|tmp|root|usr)/", README)
