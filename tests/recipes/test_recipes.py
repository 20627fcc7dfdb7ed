"""Each recipe is short, composes, and holds only what differs from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from qtrain.cli import main
from qtrain.config.compose import load_recipe, recipe_names, save_config
from qtrain.config.problems import section_of
from qtrain.section import Section

RECIPES = Path(__file__).parent.parent.parent / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TAGS = {"method.name", "export.format", "method.weight.format", "method.activation.format", "method.kv_cache.format"}
"""Keys that say which keys there are, and of what: they may be written though they are the default."""


def content(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    loaded.pop("task", None)  # a tag and no section: it says which sections there are
    return loaded


def written(section: Section, keys: dict[str, Any], path: str) -> Iterator[tuple[str, Any, Any, FieldInfo]]:
    """(path, value in the file, resolved value, field) of each key, those of sections within sections one by one."""
    for key, value in keys.items():
        field, resolved = type(section).model_fields[key], getattr(section, key)
        if isinstance(value, dict) and section_of(field):
            yield from written(resolved, value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value, resolved, field


def test_these_recipes_come_with_qtrain() -> None:
    assert {"demo", "qlora_llama", "qlora_llama_70b", "lora_llama"} <= set(NAMES)
    assert {"llm_qat_llama", "qat_llama", "qat_lora_llama", "w8a8_llama", "w2_llama", "pact_fashion_mnist"} <= set(
        NAMES
    )
    assert recipe_names() == NAMES
    assert {file.name for file in files("qtrain.recipes").iterdir()} >= {f"{name}.yaml" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_short_and_says_what_it_is_for(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert 6 <= len(lines) <= 25
    assert lines[0].startswith("# ") and len(lines[0]) > 20
    assert not lines[1].startswith("#")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes_to_what_it_says(name: str) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    for section, keys in content(name).items():
        if section == "trainer":
            assert config.trainer == keys
            continue
        for path, value, resolved, _ in written(getattr(config, section), keys, section):
            assert resolved == value, path


@pytest.mark.parametrize("name", NAMES)
def test_recipe_holds_only_what_differs(name: str) -> None:
    config = load_recipe(name)
    defaults = []
    for section, keys in content(name).items():
        if section == "trainer":  # lightning's defaults are None and "auto", or what trainer_arguments() decides
            defaults += [key for key, value in keys.items() if value in (None, "auto")]
            continue
        for path, value, _, field in written(getattr(config, section), keys, section):
            if path not in TAGS and value == field.get_default(call_default_factory=True):
                defaults.append(f"{path}={value}")
    assert not defaults


@pytest.mark.parametrize("name", NAMES)
def test_resolved_recipe_is_a_recipe(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == config


def test_command_line_lists_them_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        assert f" {name} " in f" {shown} "
        for word in first.split()[:3]:
            assert word in shown
