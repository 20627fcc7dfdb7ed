"""Recipes and overrides become one checked Config, or a list of everything that is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import qtrain
from qtrain.config.compose import load_recipe, recipe_names, save_config
from qtrain.config.schema import Config
from qtrain.errors import ConfigError, ErrorList
from qtrain.methods.config import MethodSection
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.registry import Registry

RECIPES = sorted((Path(qtrain.__file__).parent / "recipes").glob("*.yaml"))


def messages(*overrides: str, recipe: str | Path | None = None) -> list[str]:
    with pytest.raises(ErrorList) as caught:
        load_recipe(recipe, *overrides)
    return [error.message() for error in caught.value.errors]


def test_there_are_recipes_and_all_are_listed() -> None:
    assert {"demo", "qlora_llama", "qlora_llama_70b", "lora_llama"} <= set(recipe_names())
    assert [file.stem for file in RECIPES] == recipe_names()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_parses_and_loses_nothing(file: Path) -> None:
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = load_recipe(file.stem)
    assert config.recipe == file.stem
    if config.task == "language":
        assert config.model.path and (config.data.train or not config.method.looks_at_text)
    resolved = config.model_dump()
    assert config.task == written.pop("task", "language")
    for section, keys in written.items():
        for key, value in keys.items():
            assert holds(resolved[section][key], value), f"{section}.{key}"


def holds(resolved: object, written: object) -> bool:
    """Whether a section has what was written of it."""
    if isinstance(resolved, dict) and isinstance(written, dict):
        return all(holds(resolved[key], value) for key, value in written.items())
    return resolved == written


def test_defaults_stand_without_a_recipe() -> None:
    config = load_recipe()
    assert config.recipe is None
    assert isinstance(config.method, QLoraOptions)
    assert (config.method.base, config.method.double_quant, config.export.format) == ("nf4", True, "compressed-tensors")


def test_a_recipe_by_path_and_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: {r: 4}\ntrainer: {max_steps: 7}\n")
    config = load_recipe(path)
    assert (config.method.r, config.trainer, config.recipe) == (4, {"max_steps": 7}, str(path))  # type: ignore[attr-defined]
    assert config.optimizer.lr == 2e-4


def test_overrides_win_and_their_values_are_yaml() -> None:
    config = load_recipe(
        "qlora_llama",
        "optimizer.lr=2e-5",
        "optimizer.betas=[0.8,0.95]",
        "data.train=[a.jsonl,b.jsonl]",
        "data.columns={prompt: question}",
        "method.target_modules=[q_proj,v_proj]",
        "method.loraplus_ratio=16",
        "run.resume=true",
        "run.samples=['What is 1+1=2?']",
        "model.revision=null",
        "trainer.max_steps=12",
        "trainer.limit_val_batches=0.5",
    )
    assert config.optimizer.lr == 2e-5
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.data.columns == {"prompt": "question"}
    assert isinstance(config.method, QLoraOptions)
    assert config.method.target_modules == ["q_proj", "v_proj"]
    assert (config.method.loraplus_ratio, config.method.r) == (16.0, 64)
    assert config.run.resume is True
    assert config.run.samples == ["What is 1+1=2?"]
    assert config.model.revision is None
    assert config.trainer["max_steps"] == 12
    assert config.trainer["limit_val_batches"] == 0.5
    assert config.trainer["accumulate_grad_batches"] == 4  # the recipe's, untouched


def test_the_later_override_wins() -> None:
    assert load_recipe(None, "run.seed=1", "run.seed=2").run.seed == 2


def test_every_mistake_is_told_at_once() -> None:
    found = messages(
        "optimizer.lr=fast",
        "optimizer.warmup=-1",
        "method.rank=8",
        "data.format=alpacca",
        "trainer.max_step=10",
        "trainer.max_epochs=many",
        "modle.path=x",
    )
    expected = [
        ("optimizer.lr='fast'", "not a number", "> 0", "0.0002"),
        ("optimizer.warmup=-1", ">= 0"),
        ("method.rank", "no key"),
        ("data.format='alpacca'", "did you mean 'alpaca'?"),
        ("trainer.max_step", "no argument of lightning.Trainer", "did you mean 'max_steps'?"),
        ("trainer.max_epochs=many", "int"),
        ("'modle'", "did you mean 'model'?"),
    ]
    assert len(found) == len(expected)
    for parts in expected:
        assert any(all(part in message for part in parts) for message in found), parts


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("method.lora_alfa=8", "'lora_alpha'"),
        ("method.name=qlorra", "'qlora'"),
        ("export.format=merge", "'merged'"),
        ("data.max_lenght=8", "'max_length'"),
        ("trainer.acumulate_grad_batches=2", "'accumulate_grad_batches'"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(override: str, hint: str) -> None:
    (message,) = messages(override)
    assert f"did you mean {hint}?" in message


@pytest.mark.parametrize("word", ["optimizer.lr", "=3", "lr==", "data.train=[a"])
def test_a_word_that_is_no_override(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, word)
    assert word.split("=")[0] in str(caught.value)


def test_a_section_cannot_be_a_value() -> None:
    (message,) = messages("optimizer=adam")
    assert "optimizer.KEY=VALUE" in message
    (message,) = messages("trainer=fast")
    assert "trainer.max_steps=100" in message


@pytest.mark.parametrize("key", ["logger", "callbacks", "default_root_dir", "enable_checkpointing", "plugins"])
def test_arguments_that_follow_from_other_sections_are_refused(key: str) -> None:
    (message,) = messages(f"trainer.{key}=x")
    assert "decided elsewhere" in message and "try:" in message


@pytest.mark.parametrize("key", ["model.dtype", "method.compute_dtype"])
@pytest.mark.parametrize("value", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_the_reason(key: str, value: str) -> None:
    (message,) = messages(f"{key}={value}")
    assert "overflows" in message and "use bf16" in message


def test_an_odd_rank_cannot_be_orthogonal() -> None:
    (message,) = messages("method.lora_init=orthogonal", "method.r=5")
    assert "method.r=6" in message


def test_unknown_recipe_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'qlora_llama'"):
        load_recipe("qlora_lama")
    with pytest.raises(ConfigError, match="is no file"):
        load_recipe("nowhere/x.yaml")
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_recipe(listing)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="broken.yaml"):
        load_recipe(broken)


def test_keys_of_another_format_go_with_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("export: {format: compressed-tensors, bits: 8, evaluate_windows: 3}\n")
    config = load_recipe(path, "export.format=merged")
    assert config.export.format == "merged"
    assert config.export.evaluate_windows == 3  # shared by all formats
    assert not hasattr(config.export, "bits")
    assert load_recipe(path).export.bits == 8  # type: ignore[attr-defined]
    (message,) = messages("export.format=merged", "export.bits=8", recipe=path)  # asked for by name: a mistake
    assert "export.bits is no key" in message


class OtherOptions(MethodSection):
    """A second method, to change to."""

    implementation = "nowhere:Nothing"
    name: str = "other"
    levels: int = 2


def test_keys_of_another_method_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    methods: Registry[type[MethodSection]] = Registry("method", {"qlora": QLoraOptions, "other": OtherOptions})
    monkeypatch.setitem(Config.tagged, "method", (methods, "name"))
    config = load_recipe("qlora_llama", "method.name=other", "method.levels=3", "method.compute_dtype=fp32")
    assert isinstance(config.method, OtherOptions)
    assert config.method.model_dump() == {"name": "other", "levels": 3, "compute_dtype": "fp32"}


def test_a_saved_config_is_the_same_config(tmp_path: Path) -> None:
    config = load_recipe(
        "qlora_llama_70b",
        "data.train=[a.jsonl,b.jsonl]",
        "optimizer.lr=3e-4",
        "export.format=merged",
        "export.base=original",
        "run.samples=['größer: {a}', '#x']",
        "generate.prompt='no: yes'",
    )
    save_config(config, tmp_path / "config.yaml")
    again = load_recipe(tmp_path / "config.yaml")
    assert again.model_dump() == config.model_dump()
    assert type(again.method) is type(config.method) and type(again.export) is type(config.export)


def test_a_saved_config_neither_overwrites_nor_resumes(tmp_path: Path) -> None:
    save_config(load_recipe("demo", "run.overwrite=true", "run.resume=true"), tmp_path / "config.yaml")
    again = load_recipe(tmp_path / "config.yaml")
    assert (again.run.overwrite, again.run.resume) == (False, False)


def test_another_name_is_a_directory_beside_the_first(tmp_path: Path) -> None:
    save_config(load_recipe("demo", "run.dir=out/first"), tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml").run.dir == "out/first"
    assert load_recipe(tmp_path / "config.yaml", "run.name=again").run.dir == "out/again"
    assert load_recipe(tmp_path / "config.yaml", "run.name=again", "run.dir=x").run.dir == "x"


def test_values_stay_checked_on_assignment() -> None:
    config = load_recipe()
    with pytest.raises(ValueError, match="greater than 0"):
        config.optimizer.lr = -1.0
