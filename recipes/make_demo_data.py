"""Write the demo's instruction data: chats with a workshop assistant that answers in one fixed, crisp style.

``python -m qtrain.recipes.make_demo_data [DIRECTORY]`` writes ``demo_train.jsonl`` and ``demo_validation.jsonl``,
the same bytes every time. Each kind of chat is one function from a random source to the turns, user first; the
result is always the first thing in the answer, and whatever is a number is computed here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

from qtrain.files import write_text
from qtrain.recipes.demo_vocabulary import DAYS, GOODS, JOBS, MATERIALS, OFF_TOPIC, PEOPLE, PLACES, TERMS, TOOLS, UNITS

Turns = list[str]

SYSTEM_PROMPTS = (
    "You are the bench assistant of a small workshop. Result first, then one line.",
    "You work at the bench. Answer short and exactly.",
    "You are a workshop assistant. No greetings, no small talk.",
)
SYSTEM_SHARE = 0.15


def number(value: Fraction, places: int = 2) -> str:
    """The value rounded to that many places, without trailing zeros."""
    text = f"{Decimal(round(value * 10**places)).scaleb(-places):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def equals(value: Fraction, places: int = 2) -> str:
    """The number behind its sign: ``= 63.5`` where it is exact, ``≈ 4.54`` where it was rounded."""
    return f"{'=' if Fraction(number(value, places)) == value else '≈'} {number(value, places)}"


def minus(text: str) -> str:
    """The text with the minus sign that print uses."""
    return text.replace("-", "−")


def conversion(random: Random) -> Turns:
    """A measure in another unit, at times with a follow-up; the working is one line."""
    unit = random.choice(UNITS)

    def ask(value: str, form: str) -> Turns:
        result = Fraction(value) * unit.factor
        working = f"{value} {unit.source} × {number(unit.factor, 9)} {equals(result)} {unit.target}"
        question = form.format(value=value, source=unit.source, target=unit.target, thing=unit.thing)
        return [question, f"**{number(result)} {unit.target}**\n{working}"]

    forms = (
        "How many {target} are {value} {source}?",
        "{value} {source} in {target}?",
        "Convert {value} {source} to {target}.",
        "The {thing} says {value} {source}. What is that in {target}?",
        "I need {value} {source} in {target} for the {thing}.",
    )
    first, second = random.sample(unit.values, 2)
    turns = ask(first, random.choice(forms))
    return turns + ask(second, "And {value} {source}?") if random.random() < 0.2 else turns


def temperature(random: Random) -> Turns:
    """Degrees Celsius in Fahrenheit or back."""
    place = random.choice(list(PLACES))
    celsius = random.randint(*PLACES[place])
    if random.random() < 0.5:
        degrees, source, target = celsius, "°C", "°F"
        result, formula = Fraction(degrees) * 9 / 5 + 32, f"{degrees} × 9/5 + 32"
    else:
        degrees, source, target = round(celsius * 9 / 5 + 32), "°F", "°C"
        result, formula = Fraction(degrees - 32) * 5 / 9, f"({degrees} − 32) × 5/9"
    forms = (
        "The {place} is at {degrees} {source}. In {target}?",
        "What is {degrees} {source} in {target}?",
        "{degrees} {source} in the {place}: how many {target}?",
    )
    question = random.choice(forms).format(place=place, degrees=degrees, source=source, target=target)
    return [minus(question), minus(f"**{number(result, 1)} {target}**\n{formula} {equals(result, 1)} {target}")]


def order(random: Random) -> Turns:
    """An order note as one line of JSON, null for what the note does not say; at times the order changes."""
    customer, item = random.choice(PEOPLE), f"{random.choice(MATERIALS)} {random.choice(GOODS)}"
    quantity, due = random.randrange(2, 60), random.choice((*DAYS, None))
    paid, said = random.choice(((True, "paid"), (False, "not paid yet"), (False, "pays on pickup"), (None, "")))
    by = f" by {due}" if due else ""
    notes = (
        f"{customer} wants {quantity} {item}{by}" + (f", {said}" if said else ""),
        f"{quantity} {item} for {customer}{by}" + (f" ({said})" if said else ""),
        f"{customer} called: {quantity} x {item}" + (f", needed {due}" if due else "") + (f", {said}" if said else ""),
    )
    asks = ("Turn this note into JSON: {}.", "Order note: {}.", "As JSON, please: {}.", "Enter this order: {}.")

    def record(quantity: int, due: str | None) -> str:
        fields = {"customer": customer, "item": item, "quantity": quantity, "due": due, "paid": paid}
        return json.dumps(fields, ensure_ascii=False)

    turns = [random.choice(asks).format(random.choice(notes)), record(quantity, due)]
    if random.random() < 0.2:
        more, later = quantity + random.randrange(1, 12), random.choice([day for day in DAYS if day != due])
        changes = ((f"Make it {more}.", record(more, due)), (f"They need it {later}.", record(quantity, later)))
        turns += random.choice(changes)
    return turns


def safety(random: Random) -> Turns:
    """Three bullets on a tool: before, during, after."""
    tool = random.choice(list(TOOLS))
    rules = [random.choice(options) for options in TOOLS[tool]]
    first_name = random.choice(PEOPLE).split()[0]
    forms = (
        f"How do I use the {tool} safely?",
        f"Safety note for the {tool}, please.",
        f"{first_name} uses the {tool} for the first time. What matters?",
        f"Three rules for {first_name} at the {tool}?",
        f"What should {first_name} know about the {tool}?",
    )
    bullets = (f"- {when}: {rule}." for when, rule in zip(("Before", "During", "After"), rules, strict=True))
    return [random.choice(forms), "\n".join(bullets)]


def definition(random: Random) -> Turns:
    """A term of quantization in one sentence."""
    term = random.choice(list(TERMS))
    forms = ("What is {}?", "Define {}.", "{}, in one sentence?", "What does {} mean?", "Explain {} briefly.",
             "Remind me: {}?", "{} in a few words, please.", "I keep reading about {}. What is it?")  # fmt: skip
    question = random.choice(forms).format(term)
    return [question[0].upper() + question[1:], f"**{term[0].upper() + term[1:]}**: {TERMS[term]}."]


def code_of_value(random: Random) -> Turns:
    """The int4 code of a value; never one halfway between two codes, which way those round is another lesson."""
    scale = Fraction(random.choice((2, 4, 5, 10, 20)), 100)
    steps = Fraction(random.choice([tenths for tenths in range(-119, 120) if tenths % 10 != 5]), 10)
    value, nearest = number(scale * steps, 3), round(steps)
    code = max(-8, min(7, nearest))
    working = f"{value} ÷ {number(scale)} = {number(steps, 1)}, rounded to {nearest}"
    clipped = "" if code == nearest else ", clipped to −8…7"
    return [minus(f"Which int4 code has {value} at scale {number(scale)}?"), minus(f"**{code}**\n{working}{clipped}")]


def value_of_code(random: Random) -> Turns:
    """The value of an int4 code."""
    scale, code = Fraction(random.randrange(1, 60), 1000), random.randrange(-8, 8)
    value = number(scale * code, 3)
    question = f"What value has int4 code {code} at scale {number(scale, 3)}?"
    return [minus(question), minus(f"**{value}**\n{code} × {number(scale, 3)} = {value}")]


def scale_of_group(random: Random) -> Turns:
    """The symmetric scale of a group from its largest magnitude."""
    bits, absmax = random.choice((3, 4, 8)), Fraction(random.randrange(5, 400), 100)
    top = 2 ** (bits - 1) - 1
    working = f"{number(absmax)} ÷ {top} {equals(absmax / top, 4)}"
    return [f"Scale for int{bits}, symmetric, absmax {number(absmax)}?", f"**{number(absmax / top, 4)}**\n{working}"]


def bits_a_weight(random: Random) -> Turns:
    """The storage of a weight with its share of the group's scale."""
    bits, group, extra = random.choice((2, 3, 4, 8)), random.choice((16, 32, 64, 128, 256)), random.choice((8, 16))
    total = bits + Fraction(extra, group)
    forms = (
        f"Bits a weight for int{bits}, groups of {group}, {extra}-bit scales?",
        f"What does int{bits} cost with {extra}-bit scales, group size {group}?",
    )
    return [random.choice(forms), f"**{number(total, 4)} bits**\n{bits} + {extra} ÷ {group} {equals(total, 4)}"]


def size_of_model(random: Random) -> Turns:
    """The megabytes of a model's weights."""
    bits, millions = (
        random.choice((2, 3, 4, 8, 16)),
        random.choice((60, 125, 135, 360, 500, 700, 1100, 1700, 3000, 7000)),
    )
    size = number(Fraction(millions * bits, 8), 3)
    question = f"How large are {millions} million weights in {bits} bits?"
    return [question, f"**{size} MB**\n{millions} × {bits} ÷ 8 = {size}"]


def cutting(random: Random) -> Turns:
    """Pieces out of a board; the saw's kerf is lost at each cut but the last."""
    board, piece, kerf = random.randrange(12, 40) * 100, random.randrange(9, 70) * 10, random.choice((2, 3, 4))
    count, ratio = (board + kerf) // (piece + kerf), Fraction(board + kerf, piece + kerf)
    wood = random.choice(MATERIALS[:9])
    forms = (
        f"How many {piece} mm pieces from a {board} mm {wood} board, kerf {kerf} mm?",
        f"I cut {piece} mm lengths off {board} mm of {wood} with a {kerf} mm blade. How many do I get?",
    )
    pieces = "1 piece" if count == 1 else f"{count} pieces"
    working = f"({board} + {kerf}) ÷ ({piece} + {kerf}) {equals(ratio)}"
    return [random.choice(forms), f"**{pieces}**\n{working}" + ("" if ratio == count else ", rounded down")]


def log_line(random: Random) -> Turns:
    """A told story as one line of the shop log: machine | job | time | state."""
    machine = random.choice(list(JOBS))
    job, minutes, who = random.choice(JOBS[machine]), random.randrange(5, 95, 5), random.choice(PEOPLE).split()[0]
    state, told = random.choice(
        (
            ("ok", "All fine now."),
            ("ok", "Runs well."),
            ("check", "Still makes a noise."),
            ("stopped", "Do not use it yet."),
        )
    )
    forms = (
        f"Log this: {who} says {job} on the {machine}, {minutes} minutes. {told}",
        f"For the log: {machine}, {job} by {who}, {minutes} minutes. {told}",
        f"{who} spent {minutes} minutes on the {machine}: {job}. {told} Log it.",
    )
    return [random.choice(forms), f"{machine} | {job} | {minutes} min | {state}"]


def refusal(random: Random) -> Turns:
    """A question that does not belong at the bench, turned down in one line."""
    topic = random.choice(list(OFF_TOPIC))
    opening = random.choice(("", "", "Quick one: ", "Off the clock: ", "By the way: ", "Just curious: ", "Tell me: "))
    question = random.choice(OFF_TOPIC[topic])
    answer = f"Not at this bench: {topic}. Ask me about measures, orders, tools or quantization."
    return [opening + question, answer]


# kind: (training chats, validation chats)
KINDS: dict[Callable[[Random], Turns], tuple[int, int]] = {
    conversion: (200, 20),
    temperature: (50, 6),
    order: (200, 22),
    safety: (200, 20),
    definition: (130, 14),
    code_of_value: (28, 3),
    value_of_code: (24, 3),
    scale_of_group: (24, 3),
    bits_a_weight: (24, 3),
    size_of_model: (24, 3),
    cutting: (60, 6),
    log_line: (120, 12),
    refusal: (90, 10),
}


def unique_chats(kind: Callable[[Random], Turns], random: Random) -> Iterator[dict[str, object]]:
    """Chats of one kind without end, no first question twice."""
    seen: set[str] = set()
    while True:
        turns = kind(random)
        if turns[0] in seen:
            continue
        seen.add(turns[0])
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        if random.random() < SYSTEM_SHARE:
            messages.insert(0, {"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
        yield {"messages": messages}


def build(seed: int = 0) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and validation chats; no first question stands in both."""
    random = Random(seed)
    train: list[dict[str, object]] = []
    validation: list[dict[str, object]] = []
    for kind, (n_train, n_validation) in KINDS.items():
        chats = unique_chats(kind, random)
        train += [next(chats) for _ in range(n_train)]
        validation += [next(chats) for _ in range(n_validation)]
    random.shuffle(train)
    random.shuffle(validation)
    return train, validation


def write(directory: Path) -> None:
    """Both files, one chat a line, into ``directory``."""
    for name, chats in zip(("demo_train", "demo_validation"), build(), strict=True):
        lines = (json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        write_text(directory / f"{name}.jsonl", "".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data"))
