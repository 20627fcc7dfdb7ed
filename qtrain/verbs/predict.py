"""`qtrain predict`"""

from __future__ import annotations

import json

import torch

from qtrain.console import say
from qtrain.data.datamodule import LanguageData
from qtrain.evaluation.generation import generate_ids
from qtrain.evaluation.progress import progress
from qtrain.files import write_json, write_text
from qtrain.verbs.request import Request
from qtrain.verbs.validate import subject_of


def run(request: Request) -> None:
    """Answer every sample of data.predict; predictions.jsonl holds prompt, prediction and reference."""
    config = request.config
    subject = subject_of(request)
    data = LanguageData(config.data, subject.tokenizer, seed=config.run.seed)
    prompts = data.prompts()
    lines, exact = [], 0
    size = config.data.batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    with subject.forward_context(), torch.no_grad():
        for batch in progress(batches, "predicting"):
            ids = [prompt for prompt, _ in batch]
            answers = generate_ids(subject.model, subject.tokenizer, ids, config.generate)  # type: ignore[arg-type]
            for answer, (_, reference) in zip(answers, batch, strict=True):
                exact += answer.text.strip() == reference.strip()
                row = {"prompt": answer.prompt, "prediction": answer.text, "reference": reference}
                lines.append(json.dumps(row, ensure_ascii=False))
    path = request.run.path / "predictions.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    figures = {"model": subject.name, "samples": len(lines), "exact": exact / len(lines), "file": path.name}
    write_json(request.run.result("predict"), figures)
    say(f"{len(lines)} predictions in {path}, {exact / len(lines):.1%} equal to their reference")
