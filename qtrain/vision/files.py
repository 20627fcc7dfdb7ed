"""Where the four idx files of an image data set lie, and weights to start from; nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtrain.errors import DataError, ModelError

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FOLDERS = ("", "raw", "FashionMNIST/raw")
"""Below ``data.path``: the files themselves, or torchvision's layout from one of its two upper directories."""


@dataclass(frozen=True)
class SplitFiles:
    """The images of a split and their labels."""

    images: Path
    labels: Path


def find_files(path: str) -> dict[str, SplitFiles]:
    """The files of ``train`` and ``test`` in a directory or in torchvision's layout below it, packed or not.

    Raises:
        DataError: there is no such directory, or one of the files is missing.
    """
    root = Path(path).expanduser()
    folders = [root / folder for folder in FOLDERS if (root / folder).is_dir()]
    folder = next((place for place in folders if _file(place, NAMES["train"][0])), root)
    found = {name: _file(folder, name) for names in NAMES.values() for name in names}
    missing = [f"{name}[.gz]" for name, file in found.items() if file is None]
    if missing:
        raise DataError(
            f"no {', '.join(missing)}" if root.is_dir() else "no such directory",
            where=f"data.path={path}",
            rule="a directory with the four idx files of Fashion-MNIST, or torchvision's root above FashionMNIST/raw",
            fix="apt install dataset-fashion-mnist (the default path), or data.path=DIR where torchvision put them",
        )
    files = {name: file for name, file in found.items() if file is not None}
    return {split: SplitFiles(files[images], files[labels]) for split, (images, labels) in NAMES.items()}


def find_weights(path: str) -> Path:
    """The safetensors file of a run's directory, or the file itself.

    Raises:
        ModelError: there is none.
    """
    root = Path(path).expanduser()
    for file in (root / "weights" / "model.safetensors", root / "model.safetensors", root):
        if file.is_file():
            return file
    raise ModelError(
        "no weights lie here" if root.exists() else "no such run or file",
        where=f"model.weights={path}",
        rule="the directory of a finished `qtrain fit task=vision`, or a .safetensors file",
    )


def _file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
