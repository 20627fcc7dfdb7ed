"""`qtrain recipes`"""

from __future__ import annotations

from importlib.resources import files

from qtrain.config.compose import load_recipe, recipe_names
from qtrain.console import listing


def run() -> None:
    """List the recipes with their first comment line."""
    rows = []
    for name in recipe_names():
        first = (files("qtrain.recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        rows.append((name, load_recipe(name).method.name, first.lstrip("# ")))
    listing("recipes: name, method, what for", rows)
