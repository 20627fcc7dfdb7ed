"""Post-training quantization as a run: a starting point, its cost in perplexity, and the packed base."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from qtrain.config.compose import save_config
from qtrain.config.schema import Config
from qtrain.console import say
from qtrain.data.datamodule import LanguageData
from qtrain.errors import ConfigError
from qtrain.evaluation.held_out import held_out, limited
from qtrain.evaluation.progress import progress_over
from qtrain.files import atomic_directory, write_json
from qtrain.methods.base import load_base
from qtrain.methods.packed.config import PackedOptions
from qtrain.models.dtype import resolve_dtypes
from qtrain.models.packed import save_packed
from qtrain.modules.token_loss import choose_loss
from qtrain.report.write import write_report
from qtrain.training.module import LanguageModule
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import best_device


def quantize_run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Quantize ``model.path`` by ``method.init`` and leave the packed model in RUN/base; the figures.

    Raises:
        ConfigError: a method without packed integers.
        QtrainError: data or model cannot be used; nothing of an earlier run is lost then.
    """
    begin = time.monotonic()
    if not isinstance(config.method, PackedOptions):
        raise ConfigError(
            f"method.name={config.method.name} has no starting point to stop at",
            rule="`qtrain quantize` packs weights without training",
            fix="method.name=ptq",
        )
    run.start(resume=False, overwrite=config.run.overwrite)
    device = best_device()
    storage, compute = resolve_dtypes(config.model.dtype, config.method.compute_dtype, device)
    measured = config.data.validation is not None
    base = None
    if measured:  # else each layer may be read when it is quantized
        base = load_base(config.model, config.method, storage, compute_dtype=compute, device=device)
    module = LanguageModule(config, base=base, progress=progress_over("quantizing"), scratch=run.scratch)
    data = LanguageData(config.data, module.tokenizer, seed=config.run.seed)
    for stage, wanted in (("fit", config.data.train is not None), ("validate", measured)):
        if wanted:
            data.setup(stage)
            break
    limit = config.trainer.get("limit_val_batches")
    full = None if base is None else _perplexity(base.to(device), data, compute, limit)  # type: ignore[arg-type]
    started = time.monotonic()
    model = module.build(device, data)
    if config.method.looks_at_text:
        module.calibrate(data.rows("train", getattr(config.method, "calibration_rows", 0)))
    seconds = time.monotonic() - started
    plain = module.method.plain_model(model)
    quantized = _perplexity(plain, data, compute, limit) if measured else None
    run.clear()
    save_config(config, run.config)
    with atomic_directory(run.base) as whole:
        save_packed(plain, whole)
        module.tokenizer.save_pretrained(whole)
    shutil.rmtree(run.scratch, ignore_errors=True)
    loading = [f"loading     {module.loading}"] if module.loading is not None else []
    say([*module.method.lines(model), *loading], title="model")
    figures = {
        "perplexity_full": full,
        "perplexity_quantized": quantized,
        "bytes": sum(file.stat().st_size for file in run.base.glob("*.safetensors")),
        "quantize_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "base": config.model.path,
        "base_fingerprint": module.base_fingerprint,
    }
    write_json(run.result("quantize"), figures)
    write_report(run.path)
    return figures


def _perplexity(model: PreTrainedModel, data: LanguageData, compute: torch.dtype, limit: int | float | None) -> float:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
        loss, _ = choose_loss(model)
        found = held_out(loss, limited(data.val_dataloader(), limit), device)
    model.train(training)
    return found.perplexity
