"""Where a model's files are: a hub id, a directory, a .gguf file (alone in a directory, or in an installed package)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtrain.errors import ModelError
from qtrain.models.config import ModelSection
from qtrain.package_files import PREFIX, package_file
from qtrain.paths import unreachable
from qtrain.registry import did_you_mean

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class ModelSource:
    """A model's place: for ``gguf`` the file, for ``directory`` the directory, for ``hub`` the id."""

    kind: Literal["hub", "directory", "gguf"]
    location: str

    @property
    def loader_arguments(self) -> dict[str, str]:
        """What transformers' ``from_pretrained`` wants to hear of it."""
        if self.kind != "gguf":
            return {"pretrained_model_name_or_path": self.location}
        path = Path(self.location)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def find_model(section: ModelSection) -> ModelSource:
    """The source that ``model.path`` names.

    Raises:
        ModelError: there is nothing, or nothing that can be a model.
    """
    name = section.path
    if not name:
        raise ModelError(
            "model.path is not set",
            rule="each run begins with a model",
            fix="model.path=HUB_ID, a directory, or a .gguf file",
        )
    path = package_file(name) if name.startswith(PREFIX) else Path(name).expanduser()
    if reason := unreachable(path):
        raise ModelError(
            f"model.path={name[:100]} cannot be looked at: {reason}",
            rule="a hub id, a directory, or a .gguf file",
            fix="check the path",
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model.path={name} is a {path.suffix or 'plain'} file",
                rule="a model is a directory with config.json and safetensors, or a .gguf file",
                fix=f"model.path={path.parent}",
            )
        return ModelSource("gguf", str(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            if len(files := list(path.glob("*.gguf"))) == 1:
                return ModelSource("gguf", str(files[0]))
            raise ModelError(
                f"model.path={name} has no config.json",
                rule="a model directory holds config.json, or one .gguf file",
                fix="model.path=THE_FILE, where there are several .gguf files" if files else "the directory that does",
            )
        if not list(path.glob("*.safetensors")):
            pickles = [file.name for file in path.glob("*.bin")]
            raise ModelError(
                f"model.path={name} has no *.safetensors" + (f", only {pickles[0]}" if pickles else ""),
                rule="weights are read from safetensors alone: pickle files run code",
                fix="where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(DIRECTORY)"
                if pickles
                else "the directory that holds the weights, or download it again",
            )
        return ModelSource("directory", str(path))
    if HUB_ID.match(name) and path.suffix not in (".gguf", ".safetensors", ".bin") and not name.startswith("."):
        return ModelSource("hub", name)
    near = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ModelError(
        f"model.path={name} does not exist",
        rule="a hub id (ORG/NAME), a directory, or a .gguf file",
        fix=did_you_mean(name, near) if near else "check the path",
    )
