"""What is lost where an adapter is merged and the sum quantized: told in a sentence; nothing by fq(W + BA)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qtrain.cli import main
from qtrain.evaluation.drift import Drift, drift
from qtrain.export.config import FORMATS
from qtrain.export.consumers import load_export
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.check import check_export
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.modules.deployed import DeployedModel
from qtrain.registry import resolve
from qtrain.training.merge_loss import merge_loss

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers on zero points, which compressed-tensors loads only where it unpacks weights at once.
    pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning"),
]

Build = Callable[..., PreTrainedModel]
Output = pytest.CaptureFixture[str]
RECIPE = "recipe=qat_lora_llama"
BESIDE = "export.format=bitsandbytes"


def adapted(model: PreTrainedModel, **keys: Any) -> tuple[nn.Module, PreTrainedModel, DeployedModel]:
    """Under adapters of rank 4 that have learned something: the model, the transformers model inside, the export's."""
    method = build_method(METHODS.get(keys["name"]).model_validate(keys))
    prepared = method.prepare(model, compute_dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return prepared.eval(), method.plain_model(prepared), method.deployed(prepared, dtype=torch.float32)


def exported(deployed: DeployedModel, name: str, out: Path, **keys: Any) -> dict[str, Any]:
    options = FORMATS.get(name).model_validate({"format": name, **keys})
    found: dict[str, Any] = resolve(options.implementation)(deployed, options, out, tokenizer=None, facts={})
    return found


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 500, (1, 32), generator=generator) for _ in range(4)]


def measured(plain: PreTrainedModel, name: str, directory: Path) -> Drift:
    return drift(plain, load_export(name, directory, torch.float32).model, rows())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_adapters_inside_the_quantizer_lose_nothing(
    tmp_path: Path, tiny_model: Build, name: str, symmetric: bool
) -> None:
    weight = {"format": "int4", "group_size": 32, "range": "learned", "symmetric": symmetric}
    _, plain, deployed = adapted(tiny_model(initializer_range=0.1), name="qat", weight=weight, lora={"r": 4})
    found = exported(deployed, name, tmp_path / "out")
    assert found["scales"] == found["rounding"] == "as trained"
    verdict = check_export(ExportLocation(name, tmp_path / "out", found), deployed, None)
    counts = verdict.figures["counts"]
    assert verdict.passed and not verdict.lossy, [*map(str, verdict.failures)]
    assert counts["codes"] == {"compared": 73728, "differing": 0} and counts["scales"]["differing"] == 0
    lost = measured(plain, name, tmp_path / "out")
    assert abs(lost.kl) < 1e-9 and lost.top1 == 1.0
    assert lost.candidate_perplexity == pytest.approx(lost.reference_perplexity, rel=1e-6)
    assert merge_loss(deployed, {**found, **lost.to_dict()}, "none") is None


LOSSY: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors": ("compressed-tensors", {"calibration_rows": 0, "rounding": "nearest"}),
    "gptq": ("gptq", {"calibration_rows": 0, "rounding": "nearest"}),
    "gguf": ("gguf", {"quantize": "q4_0"}),
    "bitsandbytes": ("bitsandbytes", {"quantize": "nf4", "allow_requantize": True}),
}


@pytest.mark.parametrize("case", LOSSY)
def test_merging_into_nf4_and_quantizing_again_is_told_in_perplexity(
    tmp_path: Path, tiny_model: Build, case: str
) -> None:
    name, keys = LOSSY[case]
    _, plain, deployed = adapted(tiny_model(initializer_range=0.1), name="qlora", r=4)
    found = exported(deployed, name, tmp_path / "out", **keys)
    unmeasured = merge_loss(deployed, found, "nf4")
    assert unmeasured is not None and "quantized again, which is lossy" in unmeasured
    figures = {"reference_perplexity": 20.0, "candidate_perplexity": 21.5}
    if name != "gguf":  # its file is read by llama.cpp
        lost = measured(plain, name, tmp_path / "out")
        assert lost.kl > 1e-4
        figures = lost.to_dict()
    told = merge_loss(deployed, {**found, **figures}, "nf4")
    before, after = figures["reference_perplexity"], figures["candidate_perplexity"]
    assert told is not None and f"from {before:.3f} to {after:.3f} ({after / before - 1:+.1%})" in told
    assert RECIPE in told and BESIDE in told and "\n" not in told


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_an_adapter_beside_its_base_loses_nothing(tmp_path: Path, tiny_model: Build, base: str) -> None:
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "plain")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    _, plain, deployed = adapted(model, name="qlora", r=4, base=base)
    found = exported(deployed, "bitsandbytes", tmp_path / "out")
    lost = measured(plain, "bitsandbytes", tmp_path / "out")
    assert lost.kl == 0.0 and lost.top1 == 1.0 and lost.candidate_perplexity == lost.reference_perplexity
    assert merge_loss(deployed, {**found, **lost.to_dict()}, base) is None


@pytest.mark.parametrize(("base", "again"), [("none", ""), ("packed", " again")])
def test_what_loses_nothing_depends_on_the_base(tmp_path: Path, tiny_model: Build, base: str, again: str) -> None:
    packed = {"packed": {"init": "rtn"}} if base == "packed" else {}
    _, _, deployed = adapted(tiny_model(), name="qlora", r=4, base=base, **packed)
    name, keys = LOSSY["gptq"]
    told = merge_loss(deployed, exported(deployed, name, tmp_path / "out", **keys), base)
    assert told is not None and f"the sum quantized{again}, which" in told and RECIPE in told and BESIDE not in told
    assert merge_loss(deployed, exported(deployed, "merged", tmp_path / "merged"), base) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A finished QLoRA run."""
    folder = tmp_path_factory.mktemp("loss")
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [
            f"Country {n} has {n % 3} cities, and the dog runs {'on ' * (n % 4)}." for n in range(first, first + 60)
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    data = [f"data.train={folder / 'train.txt'}", f"data.validation={folder / 'held_out.txt'}", "data.format=text"]
    sizes = ["data.max_length=64", "data.batch_size=2", "trainer.max_steps=6", "trainer.accelerator=cpu"]
    method = ["method.name=qlora", "method.r=4", "optimizer.lr=3e-2", "trainer.accumulate_grad_batches=1"]
    assert main(["fit", f"run.dir={folder / 'run'}", f"model.path={tiny_llama_dir}", *data, *sizes, *method]) == 0
    return folder / "run"


def record(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "export.json").read_text())[name]
    return content


def test_export_prints_the_loss_once(run: Path, capsys: Output) -> None:
    assert main(["export", f"run.dir={run}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = record(run, "compressed-tensors")
    before, after = found["reference_perplexity"], found["candidate_perplexity"]
    assert printed.count(f"took perplexity from {before:.3f} to {after:.3f} ({after / before - 1:+.1%})") == 1
    assert printed.count(RECIPE) == 1 and printed.count(BESIDE) == 1
    assert f"took perplexity from {before:.3f}" in (run / "export" / "compressed-tensors" / "README.md").read_text()


def test_export_beside_the_base_is_exact_and_verified(run: Path, capsys: Output) -> None:
    assert main(["export", f"run.dir={run}", BESIDE]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = record(run, "bitsandbytes")
    assert "0 of 73,728 codes, 0 of 1,152 scales" in printed or found["verified"]["counts"]["codes"]["differing"] == 0
    assert found["kl"] == 0.0 and found["top1"] == 1.0 and found["codes"] == "as trained"
    assert found["candidate_perplexity"] == found["reference_perplexity"] and RECIPE not in printed
    assert found["measured_in"] == "transformers with bitsandbytes and PEFT"
    assert main(["verify", f"run.dir={run}", f"model.path={run / 'export' / 'bitsandbytes'}"]) == 0
    (verified,) = json.loads((run / "verify.json").read_text())["exports"]
    assert verified["passed"] and verified["greedy_equal"] == verified["greedy_tokens"]
    assert verified["found"]["adapter"] == "ok" and verified["counts"]["codes"]["differing"] == 0


def test_the_export_answers_as_the_run_does(run: Path) -> None:
    assert main(["export", f"run.dir={run}", BESIDE, "export.evaluate=false"]) == 0
    told: list[list[int]] = []
    words = ["generate.prompt=Country 7 has", "generate.strategy=greedy", "generate.max_new_tokens=16"]
    for place in ([], [f"model.path={run / 'export' / 'bitsandbytes'}"]):
        assert main(["generate", f"run.dir={run}", *place, *words]) == 0
        (answers,) = json.loads((run / "generate.json").read_text())["answers"].values()
        told.append(answers[0]["tokens"])
    assert told[0] == told[1] and len(told[0]) == 16


def test_merged_into_codes_again_when_it_is_asked_for(run: Path, capsys: Output) -> None:
    out = run.parent / "merged"
    words = ["export", f"run.dir={run}", BESIDE, "export.quantize=nf4", f"export.dir={out}"]
    assert main(words) == 2
    assert "export.allow_requantize=true" in capsys.readouterr().err and not out.exists()
    assert main([*words, "export.allow_requantize=true"]) == 0
    found = record(run, "bitsandbytes")
    printed = " ".join(capsys.readouterr().out.split())
    assert found["codes"] == "lossy" and found["kl"] > 0 and "took perplexity from" in printed
    assert main(["verify", f"run.dir={run}", f"model.path={out}"]) == 0
    (verified,) = json.loads((run / "verify.json").read_text())["exports"]
    assert verified["passed"] and verified["lossy"]
