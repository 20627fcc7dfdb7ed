"""Where a run's exports lie, and in which format each is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.errors import ExportError
from qtrain.export.config import FORMATS
from qtrain.files import read_json


@dataclass(frozen=True)
class ExportLocation:
    """An exported directory.

    Attributes:
        facts: what export.json holds of it; empty for one that it does not name.
    """

    format: str
    directory: Path
    facts: Mapping[str, Any]


def find_exports(run_dir: Path, paths: Sequence[str] = ()) -> list[ExportLocation]:
    """The exports at ``paths``, each an export or a folder of them; without paths, all that the run has.

    Raises:
        ExportError: there is none, or a directory in no known format.
    """
    written = run_dir / "export.json"
    recorded = read_json(written) if written.is_file() else {}
    facts = {
        Path(its["directory"]).resolve(): (name, its)
        for name, its in recorded.items()
        if isinstance(its, dict) and "directory" in its
    }
    folders = [Path(path) for path in paths] or [
        run_dir / "export",
        *(Path(its["directory"]) for _, its in facts.values()),
    ]
    found: dict[Path, ExportLocation] = {}
    for folder in folders:
        if paths and not folder.is_dir():
            raise ExportError(
                f"model.path={folder} is no directory",
                rule="what is verified is an exported directory, or a folder of them",
                fix=f"qtrain verify run.dir={run_dir} takes them all",
            )
        for directory in _exports_in(folder):
            name, known = facts.get(directory.resolve(), ("", {}))
            name = name or format_of(directory)
            if not known and directory.resolve() == (run_dir / "export" / name).resolve():
                known = recorded.get(name, {})  # of a run that was moved
            found.setdefault(directory.resolve(), ExportLocation(name, directory, known))
    if not found:
        raise ExportError(
            "no export lies here",
            where=", ".join(map(str, paths)) or str(run_dir / "export"),
            rule="an export is a directory with config.json, an adapter, safetensors or a .gguf file",
            fix=f"qtrain export run.dir={run_dir}",
        )
    return list(found.values())


def format_of(directory: Path) -> str:
    """The format by what lies in a directory.

    Raises:
        ExportError: by nothing that is known.
    """
    if directory.parent.name == "export" and directory.name in FORMATS.names():
        return directory.name
    if (directory / "adapter_config.json").is_file():
        return "adapter"
    if any(directory.glob("*.gguf")):
        return "gguf"
    try:
        header = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        name = "merged" if header is None else str(header.get("quant_method"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        rule = "config.json is an object, and quantization_config in it"
        fix = "export it again"
        raise ExportError(f"config.json cannot be read: {error}", where=str(directory), rule=rule, fix=fix) from None
    if name not in FORMATS.names():
        raise ExportError(
            f"quant_method={name!r}",
            where=str(directory),
            rule="an export is in one of: " + ", ".join(FORMATS.names()),
            fix="a directory that qtrain export wrote",
        )
    return name


def _exports_in(folder: Path) -> Iterator[Path]:
    """The folder itself if it is one, else those in it."""
    if _is_export(folder):
        yield folder
    elif folder.is_dir():
        yield from sorted(entry for entry in folder.iterdir() if _is_export(entry))


def _is_export(directory: Path) -> bool:
    return directory.is_dir() and (
        any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
        or any(directory.glob("*.gguf"))
        or any(directory.glob("*.safetensors"))
    )
