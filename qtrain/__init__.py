"""What you train is what you deploy: QAT, QLoRA and PEQA on PyTorch Lightning.

    config = qtrain.load_recipe("qlora_llama", "model.path=DIR", "data.train=chats.jsonl")
    module = qtrain.LanguageModule(config)
    data = qtrain.LanguageData(config.data, module.tokenizer, seed=config.run.seed)
    lightning.Trainer(**qtrain.trainer_arguments(config)).fit(module, data)

or the whole of it, with run directory and report: ``qtrain.fit(config)``, then ``qtrain.export_run(config)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtrain.version import VERSION as __version__

if TYPE_CHECKING:
    from qtrain.config.compose import load_recipe
    from qtrain.data.datamodule import LanguageData
    from qtrain.export.config import FORMATS as EXPORT_FORMATS
    from qtrain.methods.config import METHODS
    from qtrain.numerics.spec import QuantSpec
    from qtrain.training.api import export_run, fit, prepare
    from qtrain.training.module import LanguageModule
    from qtrain.training.trainer import trainer_arguments

# No name here may be a subpackage's: importing that one would take its place.
_HOMES = {
    "EXPORT_FORMATS": "qtrain.export.config:FORMATS",
    "LanguageData": "qtrain.data.datamodule:LanguageData",
    "LanguageModule": "qtrain.training.module:LanguageModule",
    "METHODS": "qtrain.methods.config:METHODS",
    "QuantSpec": "qtrain.numerics.spec:QuantSpec",
    "export_run": "qtrain.training.api:export_run",
    "fit": "qtrain.training.api:fit",
    "load_recipe": "qtrain.config.compose:load_recipe",
    "prepare": "qtrain.training.api:prepare",
    "trainer_arguments": "qtrain.training.trainer:trainer_arguments",
}

__all__ = [
    "EXPORT_FORMATS",
    "METHODS",
    "LanguageData",
    "LanguageModule",
    "QuantSpec",
    "__version__",
    "export_run",
    "fit",
    "load_recipe",
    "prepare",
    "trainer_arguments",
]


def __getattr__(name: str) -> Any:
    # Lazily: torch and lightning take seconds to import, and the command line answers mistakes without them.
    if name not in _HOMES:
        raise AttributeError(f"module 'qtrain' has no attribute {name!r}")
    from qtrain.registry import resolve

    return resolve(_HOMES[name])
