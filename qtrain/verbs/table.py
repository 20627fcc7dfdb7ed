"""The verbs, without importing what they run."""

from __future__ import annotations

from dataclasses import dataclass

from qtrain.registry import Registry


@dataclass(frozen=True)
class Verb:
    """A word of the command line.

    Attributes:
        help: one line.
        run: ``package.module:function`` that takes a Request.
        sections: of the config that it reads, for its --help.
        splits: data that must be there.
        tasks: those it serves.
        needs_run: works on a finished run.
        judges: works on exports of that run; ``model.path`` names them and not the run's own model.
        optional: its ``splits`` may be absent; data.train may not where the method looks at text.
        words: bare words that it takes instead of a config, as its usage names them; ``run`` takes them then.
        options: ``package.module:Section`` of the keys beside them, which begin with the verb's name.
    """

    help: str
    run: str
    sections: tuple[str, ...]
    splits: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("language",)
    needs_run: bool = False
    judges: bool = False
    optional: bool = False
    words: str = ""
    options: str = ""

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return f"{self.words} [key=value ...]" if self.words else "[recipe=NAME|PATH] [section.key=value ...]"


EVERYWHERE = ("model", "run")
VERBS: Registry[Verb] = Registry(
    "verb",
    {
        "fit": Verb(
            "train a model as the recipe says",
            "qtrain.verbs.fit:run",
            (*EVERYWHERE, "data", "method", "distill", "optimizer", "trainer", "wandb"),
            ("train", "validation"),
            tasks=("language", "vision"),
        ),
        "plan": Verb(
            "what a fit would take in memory and steps, before any weight is loaded",
            "qtrain.verbs.plan:run",
            (*EVERYWHERE, "data", "method", "distill", "optimizer", "trainer"),
            ("train", "validation"),
        ),
        "validate": Verb(
            "loss and perplexity on data.validation, of a run or of model.path",
            "qtrain.verbs.validate:validate",
            (*EVERYWHERE, "data"),
            ("validation",),
        ),
        "test": Verb(
            "loss and perplexity on data.test, of a run or of model.path",
            "qtrain.verbs.validate:test",
            (*EVERYWHERE, "data"),
            ("test",),
        ),
        "predict": Verb(
            "answer the prompts of data.predict, of a run or of model.path",
            "qtrain.verbs.predict:run",
            (*EVERYWHERE, "data", "generate"),
            ("predict",),
        ),
        "generate": Verb(
            "continue or answer generate.prompt, by a run or model.path",
            "qtrain.verbs.generate:run",
            (*EVERYWHERE, "generate"),
        ),
        "generate-data": Verb(
            "texts that model.path writes from nothing, as token shards to train on",
            "qtrain.verbs.generate_data:run",
            (*EVERYWHERE, "generate_data"),
        ),
        "quantize": Verb(
            "quantize model.path after its training, by the starting point that method.init names",
            "qtrain.verbs.quantize:run",
            (*EVERYWHERE, "data", "method"),
            ("train", "validation"),
            optional=True,
        ),
        "export": Verb(
            "write a run's model in a format that other programs load",
            "qtrain.verbs.export:run",
            (*EVERYWHERE, "export"),
            needs_run=True,
        ),
        "verify": Verb(
            "compare exports of a run with what was trained: all, or those at model.path",
            "qtrain.verbs.verify:run",
            (*EVERYWHERE, "export"),
            needs_run=True,
            judges=True,
        ),
        "report": Verb(
            "one run's page anew, or several runs compared on one page",
            "qtrain.verbs.report:run",
            (),
            words="RUN [RUN ...]",
            options="qtrain.report.config:ReportOptions",
        ),
        "recipes": Verb("list the recipes that come with qtrain", "qtrain.verbs.recipes:run", ()),
    },
)
