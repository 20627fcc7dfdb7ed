"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from qtrain.config.schema import Config
from qtrain.console import out, say
from qtrain.data.summary import SplitSummary
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.training.plan.plan import GIB, MIB, Plan
from qtrain.training.plan.step_memory import HEAD

SHOWN = 900
"""Characters of the decoded sample."""


def size(count: float) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"


def show_memory(plan: Plan, config: Config) -> None:
    """The table of parts, the levels, and whether it fits."""
    if plan.memory is None or plan.peak is None:
        say(f"not estimated: {plan.unknown}", title="memory")
        return
    peak = plan.peak
    words = {
        "base weights": _base(config),
        "trained": config.method.name,
        "optimizer": config.optimizer.name,
        "activations": f"{plan.rows} x {plan.length} tokens, recompute {plan.level}",
        "at work": peak.moment,
    }
    rows = [(name, size(count), words.get(name, "")) for name, count in plan.parts() if count]
    lines = [
        f"{name:<22}{count:>12}  {note}".rstrip() for name, count, note in [*rows, ("total", size(peak.total), "")]
    ]
    say(lines, title="memory of a step, at its highest")
    say(verdict(plan))


def brief_lines(plan: Plan) -> Iterator[str]:
    """Steps and memory, as a run begins with them."""
    yield from step_lines(plan)
    if plan.memory is None or plan.peak is None:
        yield f"memory      not estimated: {plan.unknown}"
        return
    largest = sorted(plan.parts(), key=lambda part: -part[1])[:3]
    yield f"memory      {size(plan.peak.total)}, of it {', '.join(f'{name} {size(count)}' for name, count in largest)}"
    yield from verdict(plan)


def _base(config: Config) -> str:
    """What it is stored in."""
    method = config.method
    if isinstance(method, QLoraOptions):
        nested = ", double quantization" if method.double_quant and method.base in ("nf4", "fp4") else ""
        return {"none": "as model.dtype", "checkpoint": "codes of model.path"}.get(method.base, method.base + nested)
    weight = getattr(method, "weight", None)
    return (
        f"packed, {weight.format}" if method.name in ("peqa", "ptq") and weight is not None else "what does not train"
    )


def verdict(plan: Plan) -> Iterator[str]:
    """Fits or not, by what it would; other levels; LoRA over 16 bits."""
    assert plan.memory is not None and plan.peak is not None
    total = plan.peak.total
    if plan.fits:
        yield f"fits        {size(total)} of {size(plan.free)} free"
    else:
        yield f"does not fit: {size(total)} of {size(plan.free)} free, of which a step may take 92 %"
        for change in plan.changes:
            yield f"would fit   {change.words}: {size(change.total)}"
        if not plan.changes:
            yield "would fit   nothing here: a smaller model, a 4-bit base (method.base=nf4), or a larger device"
    levels = ", ".join(f"{level} {size(count)}" for level, count in plan.memory.levels().items())
    yield f"recompute   {levels}"
    if plan.peak.moment != HEAD:
        yield f"logits      {size(plan.memory.head)} at another moment"
    if plan.paged:
        yield f"paged       {size(plan.paged)} of optimizer state beside it, on the host where the GPU is full"
    if plan.sixteen_bit is not None:
        yield f"faster      LoRA over 16-bit weights fits too: method.base=none takes {size(plan.sixteen_bit)}, and"
        yield "            dequantizes nothing"


def step_lines(plan: Plan) -> Iterator[str]:
    """Tokens and counts."""
    steps = plan.steps
    yield f"a step      {steps.rows:,} rows, {steps.tokens:,} tokens, {steps.loss_tokens:,} of them with loss"
    if steps.an_epoch is None:
        yield "an epoch    of a stream: unknown"
    else:
        yield f"an epoch    {steps.an_epoch:,} steps"
    if steps.total is not None:
        epochs = f", {steps.epochs:.2f} epochs" if steps.epochs is not None else ""
        yield f"the run     {steps.total:,} steps{epochs}, {steps.total * steps.tokens:,} tokens"


def show_sample(split: SplitSummary) -> None:
    """The first sample as the model sees it; what carries loss in brackets and bold."""
    out.print("\n[bold]first sample[/bold], what carries loss in ⟦ ⟧")
    shown, text = 0, Text()
    for words, trained in split.example:
        words = words[: SHOWN - shown]
        shown += len(words)
        text.append(f"⟦{words}⟧" if trained else words, style="bold" if trained else "dim")
        if shown >= SHOWN:
            text.append(" ...")
            break
    out.print(text)
