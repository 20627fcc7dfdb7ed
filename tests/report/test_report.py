from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qtrain.errors import CheckpointError
from qtrain.report.write import write_report

HOSTILE = "\"'><b onclick=alert(0)>\\1</pre></style><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} &"
SECTIONS = ["Training", "Samples", "Export", "Data", "Figures", "Config"]
METRICS = """epoch,step,train/loss,train/lr,val/loss,val/perplexity,throughput/tokens_per_second,throughput/peak_gib
0,0,3.0,0.0001,,,,
0,1,2.5,0.0002,,,,
0,1,,,2.75,15.64,640.0,2.5
0,2,nan,0.0002,,,,
0,3,2.0,0.0001,2.25,9.49,660.0,2.75
0,4,1.9
"""


class Page(HTMLParser):
    """Tags, headings and text of a page; the parser of the standard library is the judge of what became markup."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "h2":
            self.headings.append(data)
            self._open = ""

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def split(**facts: Any) -> dict[str, Any]:
    known = {
        "samples": 12,
        "tokens": 3456,
        "length_p50": 98,
        "truncated": 0,
        "efficiency": 0.9713,
        "histogram_edges": [0, 50, 100],
        "histogram_counts": [4, 8],
        "template": None,
        "example": [["<|im_start|>user\nHi", False], ["Hello!", True]],
    }
    return known | facts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "a run"
    path.mkdir()
    (path / "config.yaml").write_text("recipe: demo\nmodel:\n  path: SmolLM2\nmethod:\n  name: qlora\n")
    (path / "metrics.csv").write_text(METRICS)
    (path / "fit.json").write_text(json.dumps({"steps": 4, "trainable_parameters": 4884480}))
    (path / "data.json").write_text(json.dumps({"train": split(), "validation": split(example=[], truncated=7)}))
    samples = [{"step": step, "prompt": "Why?", "text": f"Because {step}."} for step in (0, 2, 4)]
    (path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    drift = {"kl": 0.0312, "top1": 0.9312, "reference_perplexity": 20.0, "candidate_perplexity": 21.0}
    exported = {"format": "compressed-tensors", "bytes": 118_400_000, "notes": ["group size 64"], "drift": drift}
    (path / "export.json").write_text(json.dumps(exported))
    return path


def test_every_file_has_its_section(run: Path) -> None:
    page = Page(write_report(run))
    assert page.headings == SECTIONS
    assert page.count("svg") == 2 + 3 + 2
    for fact in (
        "a run",
        "qlora",
        "recipe demo",
        "2.25",
        "from 2.75, −18.2%",
        "4,884,480",
        "97.1%",
        "Because 0.",
        "Because 4.",
        "1 in between",
        "113 MiB",
        "93.1%",
        "+5.0%",
        "group size 64",
        "cut to max_length",
    ):
        assert fact in page.text, fact
    assert page.text.count("cut to max_length") == 1


def test_trained_and_masked_text_are_told_apart(run: Path) -> None:
    html = write_report(run).read_text()
    assert "<mark>Hello!</mark>" in html
    assert '<span class="masked">&lt;|im_start|&gt;user\nHi</span>' in html


def test_it_needs_no_other_file_and_no_script(run: Path) -> None:
    page = Page(write_report(run))
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    references = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert references == []
    policy = [attributes.get("content") for _, attributes in page.tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (["metrics.csv"], ["Samples", "Export", "Data", "Figures", "Config"]),
        (["samples.jsonl", "data.json"], ["Training", "Export", "Figures", "Config"]),
        (["metrics.csv", "samples.jsonl", "data.json", "fit.json", "export.json"], ["Config"]),
        (["config.yaml"], ["Training", "Samples", "Export", "Data", "Figures"]),
    ],
)
def test_what_is_missing_is_left_out(run: Path, missing: list[str], left: list[str]) -> None:
    for name in missing:
        (run / name).unlink()
    assert Page(write_report(run)).headings == left


def test_facts_that_are_missing_are_left_out(run: Path) -> None:
    (run / "metrics.csv").write_text("step,train/lr\n0,0.1\n")
    (run / "data.json").write_text(json.dumps({"train": {"samples": 3}}))
    (run / "export.json").write_text(json.dumps({"adapter": {"bytes": 10}, "merged": {"bytes": 2048, "kl": 1e-5}}))
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": "Why?", "text": "Because."}) + "\n\n")
    page = Page(write_report(run))
    assert page.headings == SECTIONS
    assert page.count("svg") == 1
    assert "2 KiB" in page.text and "in between" not in page.text


def test_hostile_text_stays_text(run: Path) -> None:
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    data = {HOSTILE: split(template=HOSTILE, example=[[HOSTILE, True], [HOSTILE, False]])}
    (run / "data.json").write_text(json.dumps(data))
    (run / "fit.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "export.json").write_text(json.dumps({HOSTILE: {"notes": [HOSTILE], "top1": 1.0}}))
    (run / "config.yaml").write_text(json.dumps({"recipe": HOSTILE, "model": {"path": HOSTILE}}))
    path = write_report(run)
    page = Page(path)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any({"onerror", "onclick"} & set(attributes) for _, attributes in page.tags)
    assert page.text.count(HOSTILE) >= 10
    assert page.headings == SECTIONS


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run directory"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(("text", "message"), [("{half", "no JSON"), ("[1]", "holds a list")])
def test_a_broken_file_is_named(run: Path, text: str, message: str) -> None:
    (run / "fit.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"fit.json: {message}"):
        write_report(run)
