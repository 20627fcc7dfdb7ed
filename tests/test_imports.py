"""Imports point down, and what answers mistakes on the command line loads no torch."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import qtrain

ROOT = Path(qtrain.__file__).parent

# Lowest first. A package or module of qtrain may import from the levels below its own.
LAYERS = (
    {"errors", "storage", "files", "stopping", "registry", "section", "console", "package_files", "paths", "version"},
    {"numerics"},
    {"kernels"},
    {"modules", "models"},
    {"methods", "evaluation", "export", "data", "distill", "ptq"},
    {"vision"},
    {"config"},
    {"training", "report", "callbacks", "peqa"},
    {"recipes", "verbs"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Between neighbours of one level, each with its reason.
ALLOWED = {
    ("package_files", "errors"): "a file that is not there is an error with a way out",
    ("package_files", "registry"): "and the nearest name is the way out",
    ("storage", "errors"): "what a disk refuses is an error with a way out",
    ("files", "errors"): "figures that are no numbers are an error with a way out",
    ("files", "storage"): "and each write tells it",
    ("registry", "errors"): "a name that is not registered is an error with a way out",
    ("export", "ptq"): "the int4 export chooses scales and codes with the post-training methods",
    ("methods", "ptq"): "ranges start from what flows into each layer on real text",
    ("models", "modules"): "a quantized checkpoint is loaded as packed layers",
    ("training", "callbacks"): "fit puts the callbacks on its trainer",
    ("callbacks", "training"): "checkpoints hold the state of all random sources, which training restores",
    ("training", "report"): "fit ends by writing the report",
}

HEAVY = {"torch", "lightning", "transformers", "datasets", "peft", "bitsandbytes"}


def module_files() -> dict[str, Path]:
    """Every module under qtrain by its dotted name; the links to callbacks and recipes are followed."""
    found = {}
    for directory, _, files in os.walk(ROOT, followlinks=True):
        for file in (Path(directory) / name for name in files if name.endswith(".py")):
            parts = file.relative_to(ROOT.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return dict(sorted(found.items()))


MODULES = module_files()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(code: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from qtrain import errors` names a package in its last word only.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The package or module directly under qtrain that this one belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "qtrain" and len(parts) > 1 else None


def edges() -> Iterator[tuple[str, str, str]]:
    """(package, package it imports, the import in words), the package itself and `qtrain.__version__` left out."""
    for module, file in MODULES.items():
        for name in imported(tree(file)):
            source, target = layer_of(module), layer_of(name)
            if source and target and source != target and target != "__version__":
                yield source, target, f"{module} imports {name}"


def test_every_package_has_its_level() -> None:
    present = {layer_of(module) for module in MODULES} - {None}
    assert present <= set(LEVEL), "give it a level in LAYERS"
    assert {"config", "callbacks", "recipes", "training"} <= present
    assert sum(map(len, LAYERS)) == len(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        words for source, target, words in edges() if LEVEL[target] >= LEVEL[source] and (source, target) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_among_neighbours_and_used() -> None:
    assert all(LEVEL[source] == LEVEL[target] for source, target in ALLOWED)
    assert {(source, target) for source, target, _ in edges()} >= set(ALLOWED)


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {prefix for name in imported(tree(file)) for prefix in (name, name.rpartition(".")[0])} & set(MODULES)
        for module, file in MODULES.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle
    assert set(order) >= set(MODULES)


# Packages whose __init__ names what is used from outside, each resolved when it is asked for.
LAZY = {
    "qtrain": "the public names",
    "qtrain.callbacks": "used in other people's scripts, in one line: from qtrain.callbacks import Throughput",
}


def test_packages_with_names_of_their_own_import_lazily() -> None:
    for package in LAZY:
        at_once = [
            statement
            for statement in tree(MODULES[package]).body
            if not isinstance(statement, ast.FunctionDef)
            and not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING")
        ]
        for name in chain.from_iterable(map(imported, at_once)):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or layer_of(name) in LAYERS[0], f"{name} is imported at once"


def test_their_names_are_there() -> None:
    for package in LAZY:
        module = importlib.import_module(package)
        assert set(module.__all__) - {"__version__"} == set(module._HOMES)
        assert all(getattr(module, name) is not None for name in module.__all__)
        with pytest.raises(AttributeError, match=package):
            module.no_such_name  # noqa: B018


def test_every_other_package_is_an_empty_place() -> None:
    for module, file in MODULES.items():
        if file.name == "__init__.py" and module not in LAZY:
            for statement in tree(file).body:
                assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant), module


def torch_free() -> list[str]:
    """Modules that check a command line: no device, no model and no data set is needed for that."""
    named = {"qtrain", "qtrain.cli", "qtrain.__main__", "qtrain.data.sources", "qtrain.data.formats.registry"}
    named |= {"qtrain.vision.files", "qtrain.verbs.request"}
    return [
        module
        for module in MODULES
        if module in named or module.startswith("qtrain.config.") or module.endswith(".config")
    ]


def test_checking_a_command_line_loads_no_torch() -> None:
    modules = torch_free()
    assert {"qtrain.config.schema", "qtrain.methods.qlora.config", "qtrain.models.config"} <= set(modules)
    program = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = {HEAVY} & set(sys.modules)\n"
        "    assert not heavy, f'{module} loads {sorted(heavy)}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
