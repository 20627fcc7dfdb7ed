"""What a consumer computed from an export, beside what the training graph computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qtrain.errors import ExportError
from qtrain.export.verify.verdict import Verdict

PERPLEXITY = 1e-3
"""How far apart perplexities may be, relatively: codes are equal, so what is left is the order of sums."""
TOP1 = 0.999
"""Share of equal likeliest tokens where both compute in fp32."""


CHANCE = 3.0
"""Standard errors of the mean difference of losses. SmolLM2 in W8A8, equal codes, in torchao: 1.6 % on 254 tokens."""


def judge_figures(
    verdict: Verdict, found: Mapping[str, Any], fp32: bool, recorded: Mapping[str, Any], *, ties: bool = False
) -> None:
    """Held-out text: perplexity, and the share of positions with the same likeliest token.

    Args:
        found: ``qtrain.evaluation.drift.Drift``, as a dict.
        fp32: the consumer computes the same fp32 arithmetic.
        recorded: the same, from when the export was written. What does not compute as the training did is compared
            with that, if the text was as long; all else with the trained model.
        ties: the consumer rounds inputs that lie between two codes its own way, and a deep model turns the last bit of
            one into other figures: perplexity may then differ by what chance does.
    """
    before, after, top1 = found["reference_perplexity"], found["candidate_perplexity"], found["top1"]
    same_text = recorded.get("tokens") == found["tokens"]
    problems: dict[str, list[ExportError]] = {"perplexity": [], "top-1": []}
    if verdict.lossy or not verdict.as_trained:
        if same_text:
            then = recorded["candidate_perplexity"]
            problems["perplexity"] += _apart(after, then, "when it was written", str(verdict.directory))
            if abs(top1 - recorded["top1"]) > 1 - TOP1:
                problems["top-1"].append(
                    ExportError(
                        f"the likeliest token is the same at {top1:.2%}, at {recorded['top1']:.2%} when it was written",
                        where=str(verdict.directory),
                        rule="an export stays what it was",
                    )
                )
    else:
        chance = CHANCE * found["spread"] if ties else 0.0
        problems["perplexity"] += _apart(after, before, "of the trained model", str(verdict.directory), chance)
        if fp32 and not top1 >= TOP1:
            problems["top-1"].append(
                ExportError(
                    f"the likeliest token is the same at {top1:.3%} of {found['tokens']:,} positions",
                    where=str(verdict.directory),
                    rule=f"at least {TOP1:.1%} where both compute in fp32",
                )
            )
    verdict.found("perplexity", problems["perplexity"], f"{after:.3f}")
    verdict.found("top-1", problems["top-1"], f"{top1:.2%}")
    verdict.figures |= {key: found[key] for key in ("kl", "top1", "reference_perplexity", "candidate_perplexity")}


def judge_tokens(verdict: Verdict, found: Sequence[int], own: Sequence[int], fp32: bool) -> None:
    """Greedy tokens of the consumer and of the training graph after the same prompt."""
    same = next((i for i, (a, b) in enumerate(zip(found, own, strict=False)) if a != b), min(len(found), len(own)))
    right = same == len(found) == len(own)
    problem = ExportError(
        f"greedy decoding goes another way after {same} of {len(own)} tokens",
        where=str(verdict.directory),
        rule="all are equal where both compute in fp32",
    )
    judged = fp32 and not verdict.lossy and verdict.as_trained
    verdict.found("greedy", [problem] if judged and not right else [], f"{same} of {len(own)}")
    verdict.figures |= {"greedy_equal": same, "greedy_tokens": len(own)}


def _apart(after: float, before: float, whose: str, where: str, chance: float = 0.0) -> Iterator[ExportError]:
    # Written so that NaN is apart from everything.
    if not abs(after / before - 1) <= PERPLEXITY + chance:
        yield ExportError(
            f"perplexity {after:.4f}, and {before:.4f} {whose}",
            where=where,
            rule=f"at most {PERPLEXITY + chance:.1%} apart",
        )
