"""The demo's chats: reproducible, split cleanly, in shape, and right in their numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from qtrain.recipes import make_demo_data

DATA = Path(make_demo_data.__file__).with_name("data")
FILES = ("demo_train.jsonl", "demo_validation.jsonl")


def chats(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


ALL = [chat for name in FILES for chat in chats(name)]
ANSWERS = [turn["content"] for chat in ALL for turn in chat if turn["role"] == "assistant"]


def first_question(chat: list[dict[str, str]]) -> str:
    return next(turn["content"] for turn in chat if turn["role"] == "user")


def test_generator_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    make_demo_data.write(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_sizes() -> None:
    train, validation = map(chats, FILES)
    assert 1000 <= len(train) <= 1500
    assert 100 <= len(validation) <= 150
    assert sum((DATA / name).stat().st_size for name in FILES) < 400_000
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"({len(train):,} chats)" in readme
    assert f"({len(validation):,} chats)" in readme


def test_no_question_twice_and_none_in_both_files() -> None:
    assert max(Counter(map(first_question, ALL)).values()) == 1


def test_roles_alternate_after_an_optional_system_turn() -> None:
    shapes = Counter(tuple(turn["role"] for turn in chat) for chat in ALL)
    once, twice = ("user", "assistant"), ("user", "assistant") * 2
    assert set(shapes) == {once, twice, ("system", *once), ("system", *twice)}
    assert min(shapes.values()) >= 10
    assert all(turn["content"].strip() == turn["content"] != "" for chat in ALL for turn in chat)


def evaluate(expression: str) -> Fraction:
    """The value of a sum with + - * / and parentheses, in exact arithmetic."""
    assert re.fullmatch(r"[\d.()+*/ -]+", expression), expression
    exact = re.sub(r"\d+(\.\d+)?", lambda match: f"Fraction('{match[0]}')", expression)
    value: Any = eval(exact, {"Fraction": Fraction})
    return Fraction(value)


SUMS = [line for answer in ANSWERS for line in answer.splitlines() if " = " in line or " ≈ " in line]


def test_every_sum_is_right() -> None:
    assert len(SUMS) > 400
    for line in SUMS:
        plain = line.split(",")[0].translate(str.maketrans("−×÷", "-*/"))
        left, sign, right = re.split(r" ([=≈]) ", plain)
        shown = re.match(r"-?\d+(\.\d+)?", right)
        assert shown, line
        value = evaluate(re.sub(r"(?<=\d) (fl oz|ft·lb|m/s|[a-zµ]+)(?= )", "", left))
        places = len(shown[0].partition(".")[2])
        error = abs(Fraction(shown[0]) - value)
        # Trailing zeros are cut, so an approximate 6.4 may stand for 6.40; four places are shown at most.
        assert (error == 0) == (sign == "="), line
        assert error <= Fraction(1, 2 * 10 ** max(places, 1)), line


@pytest.mark.parametrize("name", FILES)
def test_the_bold_result_is_the_one_of_the_sum(name: str) -> None:
    answers = [turn["content"] for chat in chats(name) for turn in chat if turn["content"].startswith("**")]
    for answer in answers:
        if "\n" in answer:
            check_bold(answer)


def check_bold(answer: str) -> None:
    bold, working = answer.replace("−", "-").split("\n")
    result = re.match(r"\*\*(-?[\d.]+)( [^*]+)?\*\*$", bold)
    ending = re.search(r"[=≈] (-?[\d.]+)[^,]*(, rounded (down|to (-?\d+)(, clipped to -8…7)?))?$", working)
    assert result and ending, answer
    shown, rounded = Fraction(result[1]), ending[3]
    if not rounded:
        assert shown == Fraction(ending[1])
    elif rounded == "down":
        assert shown == Fraction(ending[1]) // 1
    else:
        nearest = int(ending[4])
        assert abs(nearest - Fraction(ending[1])) < Fraction(1, 2)
        assert shown == min(7, max(-8, nearest))
        assert bool(ending[5]) == (shown != nearest)


def test_orders_are_json_that_agrees_with_the_note() -> None:
    orders = [chat for chat in ALL if chat[-1]["content"].startswith("{")]
    assert len(orders) > 200
    for chat in orders:
        note, answers = first_question(chat), [turn["content"] for turn in chat if turn["role"] == "assistant"]
        first = json.loads(answers[0])
        assert list(first) == ["customer", "item", "quantity", "due", "paid"]
        for field in ("customer", "item", "quantity"):
            assert str(first[field]) in note
        assert (first["due"] in note) if first["due"] else not re.search(r"day\b", note)
        said = re.search(r"not paid yet|pays on pickup|\bpaid\b", note)
        assert first["paid"] is (None if said is None else said[0] == "paid")
        if len(answers) > 1:
            change, second = chat[-2]["content"], json.loads(answers[1])
            field = "quantity" if change.startswith("Make it") else "due"
            assert str(second[field]) in change
            assert second | {field: first[field]} == first
