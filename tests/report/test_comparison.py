"""One page of several runs: what stands there, what is a dash, and what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qtrain.cli import main
from qtrain.config.compose import load_recipe, save_config
from qtrain.report.compared import MOST, read_runs
from qtrain.report.write import write_comparison

WORDS = ["model.path=some/model", "data.train=a.txt", "data.validation=b.txt"]
METRICS = """step,train/loss,val/loss,throughput/tokens_per_second,throughput/step_seconds,throughput/peak_gib
0,3.0,,,,
1,2.5,2.75,640.0,0.5,2.5
2,2.0,2.25,660.0,0.25,2.75
"""
HOSTILE = "\"'><script>alert(1)</script> {{ 7 * 7 }} &"


def made(root: Path, name: str, *words: str, recipe: str = "qlora_llama", metrics: str = METRICS, **files: Any) -> Path:
    path = root / name
    path.mkdir(parents=True)
    given = WORDS if "vision" not in recipe and "pact" not in recipe else []
    save_config(load_recipe(recipe, *given, *words), path / "config.yaml")
    (path / "metrics.csv").write_text(metrics)
    for file, content in files.items():
        (path / f"{file}.json").write_text(json.dumps(content))
    return path


def finished(**more: Any) -> dict[str, Any]:
    return {"steps": 3, "seconds": 75, "val_perplexity_before": 26.16, "val_perplexity_after": 14.17} | more


class Tables(HTMLParser):
    """Rows of each table under its heading, by the standard library's parser; tags and what they were given."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = path.read_text(encoding="utf-8")
        self._heading, self._into = "", ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")
        elif tag == "h2":
            self._heading = ""
        if tag in ("td", "th", "h2"):
            self._into = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._into:
            self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "h2":
            self._heading += data
        elif self._into:
            self.tables[self._heading][-1][-1] += data

    def cell(self, heading: str, row: str, column: str) -> str:
        columns, *rows = self.tables[heading]
        return next(cells for cells in rows if cells[0] == row)[columns.index(column)]


def compared(tmp_path: Path, *runs: Path) -> Tables:
    return Tables(write_comparison(runs, tmp_path / "page.html"))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    drift = {"reference_perplexity": 14.17, "candidate_perplexity": 14.86, "kl": 0.03, "top1": 0.93}
    export = {"compressed-tensors": {"bytes": 118_400_000, "merge_loss": 0.0487, **drift}}
    path = made(tmp_path, "lora", fit=finished(tokens_per_second=655.5, peak_gib=2.8, device="cpu"), export=export)
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 4096)
    return path


@pytest.fixture
def qat(tmp_path: Path) -> Path:
    recovery = {"full": 26.1, "ptq": 36.3, "qat": 27.2, "share": 0.875}
    return made(tmp_path, "qat", recipe="qat_llama", fit=finished(val_perplexity_after=27.2, recovery=recovery))


def test_figures_stand_under_their_names_and_missing_ones_are_dashes(tmp_path: Path, lora: Path, qat: Path) -> None:
    quantize = {"perplexity_full": 26.1, "perplexity_quantized": 28.8, "seconds": 80.0}
    gptq = made(tmp_path, "gptq", recipe="ptq_gptq", metrics="step\n", quantize=quantize)
    page = compared(tmp_path, lora, qat, gptq)
    quality = "Perplexity, held-out text"
    assert page.tables[quality] == [
        ["run", "full precision", "PTQ", "before training", "trained", "share recovered", "lost by merging"],
        ["lora", "–", "–", "26.160", "14.170", "–", "+4.9%"],
        ["qat", "26.100", "36.300", "26.160", "27.200", "87.5%", "–"],
        ["gptq", "26.100", "28.800", "–", "–", "–", "–"],
    ]
    cost = "Speed, memory and size"
    assert page.cell(cost, "lora", "tokens/s") == "656" and page.cell(cost, "qat", "tokens/s") == "650"
    assert page.cell(cost, "lora", "a step") == "0.375 s"
    assert page.cell(cost, "lora", "peak memory") == "2.8 GiB" and page.cell(cost, "gptq", "peak memory") == "–"
    assert page.cell(cost, "lora", "trained part") == "adapter 4 KiB"
    assert [page.cell(cost, name, "wall time") for name in ("lora", "gptq")] == ["1 min 15 s", "1 min 20 s"]
    assert page.cell("Exports", "lora", "size") == "113 MiB"
    keys = {key: values for key, *values in page.tables["Where the configs differ"]}
    assert keys["method.name"] == ["qlora", "qat", "ptq"] and keys["method.r"] == ["64", "–", "–"]
    assert not {"run.name", "run.dir", "recipe", "model.path", "method.rslora"} & keys.keys()


def test_curves_share_an_axis_and_a_colour_stands_for_a_run(tmp_path: Path, lora: Path, qat: Path) -> None:
    page = compared(tmp_path, lora, qat)
    drawings = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert drawings == ["loss", "loss"]  # for wide and for narrow windows
    svg = page.text[page.text.index("<svg") : page.text.index("</svg>")]
    assert len(re.findall(r"stroke: var\(--run-0\)", svg)) == len(re.findall(r"stroke: var\(--run-1\)", svg)) >= 2
    assert "var(--run-2)" not in svg and "#07" not in page.text
    legend = page.text[page.text.index('<p class="runs">') :].split("</p>")[0]
    assert '"run run-0 dash-0">lora<' in legend and '"run run-1 dash-0">qat<' in legend


def test_runs_that_count_other_things_have_axes_of_their_own(tmp_path: Path, lora: Path) -> None:
    taught = made(tmp_path, "taught", "distill.loss=forward_kl", recipe="lora_llama", fit=finished())
    metrics = "step,train/loss,val/loss,val/accuracy,throughput/samples_per_second\n0,2.0,,,900\n1,1.0,0.9,0.91,1100\n"
    share = {"full": 0.9393, "ptq": 0.71, "qat": 0.9392, "share": 0.9996}
    fit = {"steps": 2, "test_accuracy": 0.9392, "val_accuracy": 0.91, "recovery": share}
    pact = made(tmp_path, "pact", recipe="pact_fashion_mnist", metrics=metrics, fit=fit)
    page = compared(tmp_path, lora, taught, pact)
    titles = re.findall(r"<figcaption>([^<]*)", page.text)
    assert titles == ["Loss", "Loss", "Training loss, forward kl from the teacher", "Held-out accuracy"]
    assert "nats an image" in page.text
    assert page.tables["Accuracy, test images"] == [
        ["run", "full precision", "PTQ", "trained", "share recovered", "held-out images"],
        ["pact", "93.93%", "71.00%", "93.92%", "100.0%", "91.00%"],
    ]
    assert page.cell("Speed, memory and size", "pact", "images/s") == "1,000"
    assert page.cell("Speed, memory and size", "pact", "tokens/s") == "–"


def test_a_run_that_never_finished_says_so(tmp_path: Path, lora: Path) -> None:
    killed = made(tmp_path, "killed", "trainer.max_steps=400")
    begun = made(tmp_path, "begun", metrics="step\n")
    page = compared(tmp_path, lora, killed, begun)
    states = [page.cell("", name, "state") for name in ("lora", "killed", "begun")]
    assert states == ["finished", "not finished: 3 of 400 steps logged", "not finished: no step logged"]
    assert page.cell("Perplexity, held-out text", "killed", "trained") == "–"


@pytest.mark.parametrize(("words", "told"), [(["data.max_length=64"], True), (["optimizer.lr=1e-5"], False)])
def test_perplexities_of_other_text_are_not_to_be_compared(
    tmp_path: Path, words: list[str], told: bool, lora: Path
) -> None:
    data = {"validation": {"tokens": 100, "loss_tokens": 90}}
    (lora / "data.json").write_text(json.dumps(data))
    other = made(tmp_path, "other", *words, fit=finished(), data=data)
    assert ('class="caution"' in compared(tmp_path, lora, other).text) == told


def test_names_are_told_apart_by_what_is_above_them(tmp_path: Path) -> None:
    runs = [made(tmp_path, name, fit=finished()) for name in ("x/one", "y/one", "y/two")]
    assert [run.label for run in read_runs(runs)] == ["x/one", "y/one", "two"]


def test_the_ninth_run_has_the_first_colour_in_dashes(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"r{n}", fit=finished()) for n in range(9)]
    page = compared(tmp_path, *runs)
    assert "run run-0 dash-1" in page.text and "stroke-dasharray" in page.text


def test_hostile_names_and_values_stay_text(tmp_path: Path, lora: Path) -> None:
    bad = made(tmp_path, "bad<img src=x>", fit=finished(device=HOSTILE), export={HOSTILE: {"bytes": 1}})
    (bad / "config.yaml").write_text(json.dumps({"method": {"name": HOSTILE}, HOSTILE: {"a": HOSTILE}, "task": []}))
    page = compared(tmp_path, lora, bad)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [key for _, attributes in page.tags for key in attributes if key in ("src", "href") or key[:2] == "on"]
    assert page.cell("", "bad<img src=x>", "method") == HOSTILE


def test_the_command_writes_beside_the_runs_and_overwrites_nothing(
    tmp_path: Path, lora: Path, qat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", str(lora), str(qat)]
    page = tmp_path / "comparison.html"
    assert main(words) == 0 and capsys.readouterr().out.strip() == str(page)
    page.write_text("mine")
    assert main(words) == 2 and page.read_text() == "mine"
    assert "report.overwrite=true" in capsys.readouterr().err
    assert main([*words, "report.overwrite=true"]) == 0 and page.read_text() != "mine"
    assert main([*words, f"report.path={tmp_path / 'lr=1' / 'other.html'}"]) == 0
    assert (tmp_path / "lr=1" / "other.html").read_bytes() == page.read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_of_one_run_its_own_page_is_made_anew(tmp_path: Path, lora: Path) -> None:
    (lora / "report.html").write_text("old")
    assert main(["report", str(lora)]) == 0
    assert "qtrain report" in (lora / "report.html").read_text()
    assert main(["report", str(lora), f"report.path={tmp_path / 'one.html'}"]) == 0
    assert (tmp_path / "one.html").read_bytes() == (lora / "report.html").read_bytes()


BAD = {
    "none": ([], "names no run"),
    "absent": (["lora", "lorra"], "lorra: no such run directory", "runs in", "lora"),
    "empty": (["lora", "empty"], "empty: no run lies here", "config.yaml"),
    "above": (["lora", "."], "no run lies here", "./*/"),
    "file": (["lora", "notes.txt"], "notes.txt: a file, no run directory"),
    "twice": (["lora", "./lora"], "the same run twice"),
    "two mistakes": (["lora", "empty", "notes.txt"], "empty: no run", "notes.txt: a file"),
    "key": (["lora", "report.pth=x.html"], "report.pth is no key", "path"),
    "section": (["lora", "recipe=demo"], "does not read 'recipe'", "report"),
    "value": (["lora", "report.overwrite=perhaps"], "report.overwrite", "perhaps"),
    "path": (["lora", "empty", "report.path=empty"], "report.path", "a directory lies there"),
    "config": (["lora", "torn"], "no YAML", "config.yaml of torn"),
    "bytes": (["lora", "binary"], "no UTF-8", "config.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_says_why(
    tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("")
    for broken, content in (("torn", b"run: {name: ["), ("binary", b"\xff\xfe\x00")):
        Path(broken).mkdir()
        Path(broken, "config.yaml").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    words, *expected = BAD[name]
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("rule:", "try:", *expected)), error
    assert sorted(tmp_path.rglob("*")) == before


def test_more_runs_than_colours_and_dashes_are_refused(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"r{n}") for n in range(MOST + 1)]
    assert main(["report", *map(str, runs)]) == 2


def test_the_help_lists_words_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "qtrain report RUN [RUN ...] [key=value ...]" in shown and "report.overwrite" in shown
