"""The model card: README.md of an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined

from qtrain.files import write_text


def write_card(directory: Path, facts: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write README.md; call it again with ``figures`` when they are measured.

    Args:
        facts: what is known of the training; every key may be missing:
            ``name`` of the model, ``base_model``, ``license``, ``recipe``, ``method`` (one line), ``data`` (one line),
            ``training`` (label to value), ``figures`` (rows of ``name``, ``trained``, ``exported``).
        result: what ``write`` returned.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("qtrain.export").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    base = str(facts.get("base_model") or "")
    # A path of the machine that trained says nothing to the reader; its last part may.
    is_path = PurePath(base).is_absolute() or base.startswith((".", "~"))
    known = {
        "name": facts.get("name") or PurePath(base).name or "Exported model",
        "base_model": PurePath(base).name if is_path else base,
        "on_hub": bool(base) and not is_path and base.count("/") == 1 and not Path(base).exists(),
        **{key: facts.get(key) for key in ("license", "recipe", "method", "data", "training", "figures")},
    }
    write_text(directory / "README.md", template.render(**known, result=result))
