"""Which cases make a row, what each is held against, and how long it will take; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

TOKENS = 4 * 2048 * 15
"""Of a usual case: 12 steps after 3."""
START = 22
"""Seconds until a process trains: imports, CUDA, Triton's first compilations."""
READ_7B = 25
"""Seconds to read and quantize a 7B checkpoint."""


@dataclass(frozen=True)
class Against:
    """A peer of the same row, and what is asked: at least so many times its speed, at most its memory so many times."""

    case: str
    speed: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        word: the script's argument; default: ``name``.
        script: module of benchmarks.gpu.
        rate: tokens a second that are expected on an H200 (measured for peers, a guess for ours).
        prepare: seconds between the imports and the first step.
        at_most: GiB that the peak is asked to stay below.
    """

    name: str
    script: str
    rate: float
    prepare: float = 5
    tokens: int = TOKENS
    against: tuple[Against, ...] = ()
    at_most: float | None = None
    word: str | None = None

    @property
    def seconds(self) -> float:
        """Expected on an H200."""
        return START + self.prepare + self.tokens / self.rate


@dataclass(frozen=True)
class Row:
    """Cases that are compared: one after the other, on the same GPU."""

    name: str
    title: str
    cases: tuple[Case, ...]
    reads_checkpoint: bool = False

    @property
    def seconds(self) -> float:
        """Of all its cases."""
        return sum(case.seconds for case in self.cases)


def _from_files(name: str, script: str, rate: float, *against: Against, tokens: int = TOKENS) -> Case:
    return Case(name, script, rate, READ_7B, tokens, against)


PEFT = "peft-full"
QLORA = (
    _from_files("ours-none", "qlora_7b", 17000, Against("unsloth-none", 1.15, 1.0), Against(PEFT, 2.8)),
    _from_files("unsloth-none", "qlora_7b_unsloth", 16300),
    _from_files(PEFT, "qlora_7b", 6600),
    _from_files("ours-full", "qlora_7b", 12500, Against("unsloth-full", 1.15, 1.0), Against(PEFT, 2.0)),
    _from_files("unsloth-full", "qlora_7b_unsloth", 11700),
    _from_files("ours-offload", "qlora_7b", 12000, Against("unsloth-offload", 1.15, 1.0)),
    _from_files("unsloth-offload", "qlora_7b_unsloth", 11500),
)
FP8 = (
    _from_files("ours-fp8", "qlora_7b", 20000, Against("ours-none", 1.3)),
    _from_files("ours-none", "qlora_7b", 17000),
)
PADDED, TRL, STREAM = "peft-padded", "trl-packed", "peft-concatenated"
SHORT = (
    _from_files("ours-full", "short_samples", 11500, Against(PADDED, 3.0), Against(TRL, 1.5), Against(STREAM, 1.5)),
    _from_files(PADDED, "short_samples", 2800, tokens=27 * 16 * 237),
    _from_files(TRL, "short_samples", 5000),
    _from_files("ours-none", "short_samples", 16000, Against(PADDED, 3.0), Against(TRL, 1.5), Against(STREAM, 1.5)),
    _from_files(STREAM, "short_samples", 6500),
)


def _qat(shape: str, rate: float, full: float, low: float) -> tuple[Case, ...]:
    """``full``, ``low``: asked of per-channel specs with the backward in bf16, and with the gradient in int8."""
    cases = [_in_shape(shape, "bf16", rate), _in_shape(shape, "fp32", rate * 0.8, Against("bf16"))]
    for spec, speed, memory, share in (
        ("w8a8-triton", full, 0.90, 0.8),
        ("w8a8-int8", full, 0.90, 1.0),
        ("w8a8-int8-gradient", low, 0.90, 1.1),
        ("w8a8-int8-graphs", full, None, 1.0),  # replayed layers keep their gradients' memory
        ("w8a8-int8-gradient-graphs", low, None, 1.1),
        ("w4a8-triton", full, 0.90, 0.8),
        ("w4a8-int8", full, 0.90, 1.0),
        ("w4a8-int8-gradient", low, 0.90, 1.1),
        ("w4a8-int8-graphs", full, None, 1.0),
        ("w4a8-int8-gradient-graphs", low, None, 1.1),
        ("w4g32", 0.97, 1.02, 0.9),
        ("8da4w", 0.92, 1.02, 0.8),
    ):
        # Weights in fp32, as QAT keeps them: their optimizer moves twice the bytes of bf16's. Then in bf16.
        asked = Against("bf16", speed, memory)
        cases.append(_in_shape(shape, spec, rate * share * 0.8, asked, Against("fp32")))
        cases.append(_in_shape(shape, f"{spec}:bf16", rate * share, asked))
    return tuple(cases)


def _in_shape(shape: str, name: str, rate: float, *against: Against) -> Case:
    return Case(name, "qat", rate, against=against, word=f"{shape}:{name}")


def _peqa(level: str, rate: float) -> tuple[Case, ...]:
    """``rate``: of QLoRA."""
    cases = [Case("qlora", "peqa_7b", rate, word=f"qlora:{level}")]
    for kernels in ("auto", "plain"):
        for name, share, asked in (("peqa-row", 0.9, 1.05), ("peqa-g128", 0.55, 0.70)):
            name = f"{name}-{kernels}"
            against = (Against("qlora", asked, 1.0),)
            cases.append(Case(name, "peqa_7b", rate * share, 15, against=against, word=f"{name}:{level}"))
    return tuple(cases)


LARGE = (
    Case("qlora", "shape_65b", 700, 30, 5 * 512, at_most=41),
    Case("peqa-row", "shape_65b", 700, 60, 5 * 512, at_most=38),
    Case("peqa-g128", "shape_65b", 500, 60, 5 * 512, at_most=41),
)
CONTEXT = tuple(
    Case(name, "context", rate, 8, 9 * 32768, against=() if name == "1k" else (Against("1k"),))
    for name, rate in (("1k", 12500), ("4k", 11500), ("16k", 9500), ("32k", 7500))
)

ROWS = {
    row.name: row
    for row in (
        Row("qlora-7b", "QLoRA of a 7B Llama, 4 x 2048, r 64: `qtrain fit` itself", QLORA, reads_checkpoint=True),
        Row("fp8", "FP8 products against bf16 products, QLoRA 7B, no recomputation", FP8, reads_checkpoint=True),
        Row("short", "QLoRA of a 7B Llama on short samples, useful tokens", SHORT, reads_checkpoint=True),
        Row("qat-7b", "QAT of 4 layers of the 7B's width", _qat("7b-layers", 45000, 1.05, 1.20)),
        Row("qat-1b", "QAT of Llama 3.2 1B's shape", _qat("1b", 60000, 1.00, 1.08)),
        Row("peqa-7b", "PEQA in 4 bits, 7B, no recomputation", _peqa("none", 16000)),
        Row("peqa-7b-full", "PEQA in 4 bits, 7B, all recomputed", _peqa("full", 12000)),
        Row("65b", "65B, 1 x 512 tokens, all recomputed: peak memory", LARGE),
        Row("context", "QLoRA 7B, 32,768 tokens a step in longer and longer rows", CONTEXT),
    )
}


def chosen(words: list[str]) -> list[Row]:
    """``ROW``, ``ROW:PATTERN,PATTERN`` for some cases and the peers they are held against, or ``all``.

    Raises:
        ValueError: a name that is none, with those that are.
    """
    found = {}
    for word in ROWS if words == ["all"] else words:
        name, _, patterns = word.partition(":")
        if name not in ROWS:
            raise ValueError(f"no row {name!r}: {', '.join(ROWS)}")
        row = ROWS[name]
        wanted = (patterns or "*").split(",")
        taken = {case.name for case in row.cases if any(fnmatchcase(case.name, pattern) for pattern in wanted)}
        if not taken:
            raise ValueError(f"no case of {name} is {patterns}: {', '.join(case.name for case in row.cases)}")
        taken |= {peer.case for case in row.cases if case.name in taken for peer in case.against}
        found[name] = replace(row, cases=tuple(case for case in row.cases if case.name in taken))
    return list(found.values())
