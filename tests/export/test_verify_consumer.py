"""What a consumer computed, judged: limits, and when they hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qtrain.export.verify.consumer import judge_figures, judge_tokens
from qtrain.export.verify.verdict import Verdict


def figures(perplexity: float = 20.0, top1: float = 1.0, tokens: int = 1000) -> dict[str, Any]:
    return {
        "kl": 0.0,
        "top1": top1,
        "reference_perplexity": 20.0,
        "candidate_perplexity": perplexity,
        "tokens": tokens,
        "spread": 0.005,
    }


def judged(
    found: dict[str, Any], *, fp32: bool = True, recorded: Any = None, ties: bool = False, **of_verdict: Any
) -> Verdict:
    verdict = Verdict("merged", Path("out"), **of_verdict)
    judge_figures(verdict, found, fp32, recorded or {}, ties=ties)
    return verdict


@pytest.mark.parametrize(("perplexity", "failed"), [(20.3, False), (19.7, False), (20.33, True), (math.nan, True)])
def test_ties_of_inputs_may_do_what_chance_does(perplexity: float, failed: bool) -> None:
    assert judged(figures(perplexity, top1=0.9), fp32=False, ties=True).passed == (not failed)
    assert not judged(figures(perplexity, top1=0.9), fp32=False).passed


@pytest.mark.parametrize(
    ("found", "fp32", "failed"),
    [
        (figures(), True, []),
        (figures(20.0199), True, []),
        (figures(20.021), True, ["perplexity"]),
        (figures(19.979), False, ["perplexity"]),
        (figures(math.nan), True, ["perplexity"]),
        (figures(math.inf), True, ["perplexity"]),
        (figures(top1=0.9995), True, []),
        (figures(top1=0.998), True, ["top-1"]),
        (figures(top1=0.998), False, []),
        (figures(top1=math.nan), True, ["top-1"]),
    ],
)
def test_an_exact_export_computes_what_the_training_did(found: dict[str, Any], fp32: bool, failed: list[str]) -> None:
    verdict = judged(found, fp32=fp32)
    assert [name for name, cell in verdict.cells.items() if cell == "FAILED"] == failed
    assert len(verdict.failures) == len(failed)


@pytest.mark.parametrize("kind", [{"lossy": True}, {"as_trained": False}])
def test_others_compute_what_they_did_when_they_were_written(kind: dict[str, Any]) -> None:
    then = figures(25.0, top1=0.9)
    assert judged(figures(25.0, top1=0.9), recorded=then, **kind).passed
    assert not judged(figures(25.1, top1=0.9), recorded=then, **kind).passed
    assert not judged(figures(25.0, top1=0.89), recorded=then, **kind).passed
    # Nothing to compare with: another text, or none.
    assert judged(figures(30.0, tokens=500), recorded=then, **kind).passed
    assert judged(figures(30.0), **kind).passed


@pytest.mark.parametrize(
    ("found", "cell", "right"),
    [
        ([1, 2, 3], "3 of 3", True),
        ([1, 2, 4], "2 of 3", False),
        ([1, 2], "2 of 3", False),
        ([1, 2, 3, 4], "3 of 3", False),
    ],
)
def test_greedy_tokens(found: list[int], cell: str, right: bool) -> None:
    for fp32, kind in ((True, {}), (False, {}), (True, {"lossy": True}), (True, {"as_trained": False})):
        verdict = Verdict("merged", Path("out"), **kind)
        judge_tokens(verdict, found, [1, 2, 3], fp32)
        held_to_it = fp32 and not kind
        assert verdict.passed == (right or not held_to_it)
        assert verdict.cells["greedy"] == (cell if verdict.passed else "FAILED")
