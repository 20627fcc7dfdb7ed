"""The arguments of `lightning.Trainer`, read from its source: importing it takes 5-10 s."""

from __future__ import annotations

import ast
import typing
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import InstanceOf

OWNED = {
    "logger": "wandb.* decides on W&B, and metrics.csv is always written",
    "callbacks": "the Python API: lightning.Trainer(callbacks=[...])",
    "default_root_dir": "run.dir",
    "enable_checkpointing": "run.save_every",
    "plugins": "the Python API: lightning.Trainer(plugins=...)",
}
"""Arguments that follow from other sections, and from which."""


class _LightningClass:
    """Stands for each class of lightning in an annotation: no value of a config is one."""


@cache
def trainer_arguments() -> dict[str, str]:
    """Name -> annotation, as written, of every argument of Trainer."""
    spec = find_spec("lightning")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lightning is not installed")
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    arguments = [*item.args.args[1:], *item.args.kwonlyargs]
                    return {a.arg: ast.unparse(a.annotation) if a.annotation else "Any" for a in arguments}
    raise RuntimeError(f"{source.name} holds no Trainer.__init__")


def argument_type(annotation: str) -> Any:
    """The type an annotation names; lightning's own classes, which a config cannot hold, count as no type at all."""
    known: dict[str, Any] = {
        name: getattr(typing, name) for name in ("Union", "Optional", "Literal", "Any", "Iterable")
    }
    names = {node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)}
    scope: dict[str, Any] = dict.fromkeys(names, InstanceOf[_LightningClass])
    scope |= {name: typing.Any for name in names if name.startswith("_")}
    scope |= known | {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    scope |= {"timedelta": timedelta}
    return eval(annotation, {"__builtins__": {}}, scope)  # noqa: S307  the text is lightning's own source
