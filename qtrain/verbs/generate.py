"""`qtrain generate`"""

from __future__ import annotations

from rich.table import Table

from qtrain.console import out
from qtrain.errors import ConfigError
from qtrain.evaluation.generation import Generation, generate
from qtrain.files import write_json
from qtrain.training.trained import Subject, stored_subject
from qtrain.verbs.request import Request
from qtrain.verbs.validate import subject_of


def run(request: Request) -> None:
    """Answer ``generate.prompt``; beside another model's answers if ``generate.beside`` names one."""
    section = request.config.generate
    prompts = [section.prompt] if isinstance(section.prompt, str) else section.prompt or request.config.run.samples
    if not prompts:
        raise ConfigError(
            "generate.prompt is not set",
            rule="there is something to answer or to continue",
            fix="generate.prompt='What is a scale?'",
        )
    answers = {subject.name: _answers(subject, prompts, request) for subject in _subjects(request)}
    shown = Table(show_lines=True, expand=True, title_justify="left")
    shown.add_column("prompt", ratio=2)
    for name in answers:
        shown.add_column(name, ratio=3)
    for number, prompt in enumerate(prompts):
        shown.add_row(prompt, *(rows[number].text.strip() for rows in answers.values()))
    out.print(shown, markup=False)
    found = {
        name: [{"prompt": a.prompt, "text": a.text, "tokens": a.tokens} for a in rows] for name, rows in answers.items()
    }
    write_json(request.run.result("generate"), {"decoding": section.model_dump(), "answers": found})


def _subjects(request: Request) -> list[Subject]:
    subjects = [subject_of(request)]
    beside = request.config.generate.beside
    if beside:
        config = request.config.model_copy(deep=True)
        config.model.path = beside
        subjects.append(stored_subject(config))
    return subjects


def _answers(subject: Subject, prompts: list[str], request: Request) -> list[Generation]:
    with subject.forward_context():
        return generate(subject.model, subject.tokenizer, prompts, request.config.generate)  # type: ignore[arg-type]
