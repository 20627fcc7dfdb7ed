"""Adapters over packed and quantized bases, through the command line: fit, go on, measure, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.modules.frozen_linear import frozen_kind
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import trained_subject

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SHORT = ["trainer.max_steps=4", "trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu", "run.save_every=2"]
ADAPTERS = ["method.name=qlora", "method.r=4", "method.compute_dtype=fp32", "optimizer.lr=1e-2"]
INT4 = ["method.base=packed", "method.packed.weight.group_size=32"]
BASES = {
    "hqq": [*INT4, "method.packed.init=hqq", "method.packed.weight.symmetric=false"],
    "awq": [*INT4, "method.packed.init=awq", "method.packed.calibration_rows=8"],
    "gptq": ["method.base=checkpoint"],
    "bitsandbytes": ["method.base=checkpoint"],
}
Make = Callable[[str], Path]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every call here says."""
    path = tmp_path_factory.mktemp("text")
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [
            f"The capital of country {n} is city {n % 3}, and the dog runs {'on ' * (n % 4)}."
            for n in range(first, first + 60)
        ]
        (path / f"{name}.txt").write_text("\n".join(lines))
    data = [f"data.train={path / 'train.txt'}", f"data.validation={path / 'held_out.txt'}", "data.format=text"]
    return [*data, "data.max_length=64", "data.batch_size=2"]


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """4-bit numbers [rows, n] as int32 [rows, n / 8], the first in the lowest bits."""
    shifted = codes.to(torch.int64).view(len(codes), -1, 8) << torch.arange(0, 32, 4)
    packed = shifted.sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def write_gptq(source: Path, target: Path) -> None:
    """AutoGPTQ's layout by hand: symmetric int4 in groups of 32, zero points stored less one."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = model.state_dict()
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        groups = tensors.pop(name).unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
        codes = ((groups / scale).round().clamp(-8, 7) + 8).flatten(1)
        layer, (rows, columns) = name.removesuffix(".weight"), codes.shape
        tensors[f"{layer}.qweight"] = words_of(codes).t().contiguous()
        tensors[f"{layer}.qzeros"] = words_of(torch.full((columns // 32, rows), 7))
        tensors[f"{layer}.scales"] = scale.squeeze(-1).t().half().contiguous()
        tensors[f"{layer}.g_idx"] = (torch.arange(columns) // 32).to(torch.int32)
    model.config.save_pretrained(target)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    header = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    config = read(target / "config.json") | {"quantization_config": header}
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """Directories of other tools, the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("quantized")
    write_gptq(tiny_llama_dir, folder / "gptq")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "bitsandbytes")
    for name in ("gptq", "bitsandbytes"):
        tiny_tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("gptq", "bitsandbytes")}


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], tiny_llama_dir: Path, quantized: dict[str, Path]
) -> Make:
    """The finished run over a base, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def call(base: str) -> Path:
        run = folder / base
        if not run.exists():
            path = quantized.get(base, tiny_llama_dir)
            assert main(["fit", *words, f"model.path={path}", f"run.dir={run}", *SHORT, *ADAPTERS, *BASES[base]]) == 0
        return run

    return call


@pytest.mark.parametrize("base", BASES)
def test_a_fit_learns_and_is_measured_again(make: Make, base: str) -> None:
    run = make(base)
    figures = read(run / "fit.json")
    assert figures["val_loss_after"] < figures["val_loss_before"] - 0.05
    assert (run / "base").is_dir() == (base in ("hqq", "awq"))
    assert main(["validate", f"run.dir={run}"]) == 0
    assert read(run / "validate.json")["loss"] == pytest.approx(figures["val_loss_after"], rel=1e-6)
    subject = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run))
    kinds = {frozen_kind(module) for name, module in subject.plain.named_modules() if name.endswith("base_layer")}
    assert kinds == {"nf4" if base == "bitsandbytes" else "packed"}


@pytest.mark.parametrize("base", BASES)
def test_every_export(make: Make, base: str) -> None:
    run = make(base)
    formats = {
        "merged": ["export.dtype=fp32"],
        "compressed-tensors": ["export.bits=8"],
        "adapter": [],
    }
    for name, keys in formats.items():
        assert main(["export", f"run.dir={run}", f"export.format={name}", *keys]) == 0
    found = read(run / "export.json")
    assert found.keys() == formats.keys()
    assert abs(found["merged"]["kl"]) < 1e-6 and found["merged"]["top1"] == 1.0
    assert found["compressed-tensors"]["kl"] < 1e-3
    of_base = "checkpoint" if base in ("gptq", "bitsandbytes") else "packed"
    for name in ("merged", "compressed-tensors"):
        assert any(f"method.base={of_base}" in note and "anew" in note for note in found[name]["notes"])
        card = (run / "export" / name / "README.md").read_text()
        assert ("packed, by" in card) == (of_base == "packed")
    assert ("alternative" in found["merged"]) == (base == "hqq")
    merged = load_file(run / "export" / "merged" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(run / "export" / "merged", dtype=torch.float32)
    assert merged.keys() == plain.state_dict().keys()


def test_the_adapter_of_scaled_inputs_says_where_it_belongs(make: Make) -> None:
    run = make("awq")
    assert main(["export", f"run.dir={run}", "export.format=adapter"]) == 0
    (note,) = read(run / "export.json")["adapter"]["notes"]
    assert "awq scaled the layers' inputs" in note and str(run / "base") in note


@pytest.mark.parametrize(("base", "message"), [("awq", "scaled the layers' inputs"), ("gptq", "no other weights")])
def test_what_has_no_original_is_not_merged_into_one(
    make: Make, base: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run.dir={make(base)}", "export.format=merged", "export.base=original"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("base", ["hqq", "awq", "gptq"])
def test_a_killed_run_goes_on_bit_for_bit(
    make: Make, words: list[str], tiny_llama_dir: Path, quantized: dict[str, Path], tmp_path: Path, base: str
) -> None:
    whole, run = make(base), tmp_path / "run"
    keys = ["fit", *words, f"model.path={quantized.get(base, tiny_llama_dir)}", f"run.dir={run}"]
    keys += [*SHORT, *ADAPTERS, *BASES[base]]
    assert main(keys) == 0
    for path in (run / "checkpoints").glob("step-000004*"):
        path.unlink()
    kept = run / "base" / "model.safetensors"
    before = kept.read_bytes() if kept.exists() else b""
    assert main([*keys, "run.resume=true"]) == 0
    assert (kept.read_bytes() if kept.exists() else b"") == before
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())


def test_a_lost_base_is_told(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(make("hqq"), tmp_path / "run", ignore=shutil.ignore_patterns("base", "export"))
    for verb in ("validate", "export"):
        assert main([verb, f"run.dir={tmp_path / 'run'}"]) == 2
        assert "the packed base of this run is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method.packed.init=hqq"], "method.base=packed"),
        (["method.base=packed", "method.packed.init=checkpoint"], "method.base=checkpoint"),
        (["method.base=packed", "method.packed.init=gtpq"], "gptq"),
        (["method.base=packed", "method.packed.weight.format=fp8_e4m3"], "int4"),
        (["method.base=packed", "method.packed.skip=[nothing]"], "matches no layer"),
        (["method.base=checkpoint"], "16-bit weights"),
    ],
)
def test_mistakes_end_with_the_way_out(
    words: list[str],
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    assert main(["fit", *words, f"model.path={tiny_llama_dir}", f"run.dir={run}", *SHORT, *ADAPTERS, *keys]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


@pytest.mark.parametrize("base", ["nf4", "packed", "none"])
def test_codes_are_not_quantized_again(
    words: list[str], quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], base: str
) -> None:
    for name, path in quantized.items():
        keys = [f"model.path={path}", f"run.dir={tmp_path / 'run'}", *SHORT, *ADAPTERS, f"method.base={base}"]
        assert main(["fit", *words, *keys]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert f"model.path holds {name} codes" in message and "method.base=checkpoint keeps them" in message


def test_quantize_is_for_methods_over_packed_integers(
    words: list[str], tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", *words, f"model.path={tiny_llama_dir}", *ADAPTERS, *BASES["hqq"]]) == 2
    assert "method.name=ptq" in capsys.readouterr().err


def test_a_teacher_is_not_made_of_codes(
    words: list[str],
    tiny_llama_dir: Path,
    quantized: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["fit", *words, f"model.path={quantized['gptq']}", f"run.dir={tmp_path / 'run'}", *SHORT, *ADAPTERS]
    keys += [*BASES["gptq"], "distill.loss=forward_kl"]
    assert main(keys) == 2
    assert "distill.teacher=THE_MODEL" in capsys.readouterr().err
    assert main([*keys, f"distill.teacher={tiny_llama_dir}"]) == 0
