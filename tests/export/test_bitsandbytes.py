"""A base in bitsandbytes' codes and its adapter beside it: what transformers and PEFT compute is what was trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qtrain.cli import main
from qtrain.errors import ExportError
from qtrain.export.bitsandbytes.config import BitsAndBytesOptions
from qtrain.export.bitsandbytes.layer import frozen_layers
from qtrain.export.bitsandbytes.write import write
from qtrain.export.config import FORMATS
from qtrain.export.consumers import load_export
from qtrain.export.locations import ExportLocation
from qtrain.export.verify.check import check_export
from qtrain.methods.base import load_base
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.methods.qlora.method import QLora
from qtrain.models.config import ModelSection
from qtrain.modules.frozen_linear import dense_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT 0.21
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

Build = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj"
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"base": "nf4"},
    "nf4-plain-scales": {"base": "nf4", "double_quant": False},
    "nf4-dora": {"base": "nf4", "dora": True},
    "nf4-some": {"base": "nf4", "target_modules": ["q_proj", "down_proj"], "rslora": True},
    "nf4-tied": {"base": "nf4"},
    "nf4-bf16": {"base": "nf4"},
    "fp4": {"base": "fp4"},
    "int8": {"base": "int8"},
}


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith("bf16") else torch.float32


def stir(model: nn.Module) -> None:
    """Move B off zero, and DoRA's magnitudes off the norms, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))


def trained(source: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[QLora, PeftModel]:
    """Loaded, as a training loads it (``.to(bf16)`` would round RoPE's frequencies), frozen, adapted and moved."""
    base = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    method = build_method(QLoraOptions(r=4, **options))
    assert isinstance(method, QLora)
    torch.manual_seed(5)
    model = method.prepare(base, compute_dtype=dtype, device=CPU)
    stir(model)
    return method, model.eval()


def export(method: QLora, model: PeftModel, out: Path, tokenizer: Any = None, **keys: Any) -> dict[str, Any]:
    dtype = method.plain_model(model).dtype
    options = BitsAndBytesOptions(format="bitsandbytes", max_shard_size="60KB", **keys)
    return write(method.deployed(model, dtype=dtype), options, out, tokenizer=tokenizer, facts={})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_model: Build) -> Callable[[str], Path]:
    """Directories of plain models that trainings begin with."""
    folder = tmp_path_factory.mktemp("sources")
    for name, keys in {"free": {"attention_bias": True}, "tied": {"tie_word_embeddings": True}}.items():
        tiny_model(initializer_range=0.1, **{"tie_word_embeddings": False, **keys}).save_pretrained(folder / name)
    return lambda case: folder / ("tied" if case.endswith("tied") else "free")


@pytest.fixture(scope="module")
def consumed(
    tmp_path_factory: pytest.TempPathFactory,
    sources: Callable[[str], Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """All cases exported, the last one merged too, and read by one process that cannot import qtrain."""
    folder = tmp_path_factory.mktemp("exported")
    for name, options in CASES.items():
        export(*trained(sources(name), options, dtype_of(name)), folder / name, tiny_tokenizer)
    for kind in ("nf4", "int8"):
        again = {"quantize": kind, "allow_requantize": True}
        export(*trained(sources("nf4"), CASES["nf4"]), folder / f"merged-{kind}", tiny_tokenizer, **again)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("consume_bitsandbytes.py"), *sorted(folder.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def autocast(model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """What bf16 is trained under."""
    bf16 = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with autocast(model):
        result: Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_consumers_logits_are_the_training_graphs_bit_by_bit(
    consumed: Path, sources: Callable[[str], Path], name: str
) -> None:
    seen = load_file(consumed / f"{name}.seen")
    _, model = trained(sources(name), CASES[name], dtype_of(name))
    expected = logits(model, seen["ids"])
    assert expected.dtype == dtype_of(name) and float(expected.std()) > 0.3
    assert torch.equal(seen["logits"], expected)
    with model.disable_adapter():
        assert not torch.equal(seen["logits"], logits(model, seen["ids"]))
    with autocast(model):
        tokens = model.generate(
            input_ids=seen["ids"], attention_mask=torch.ones_like(seen["ids"]), max_new_tokens=8, do_sample=False
        )
    assert torch.equal(tokens, seen["tokens"])


@pytest.mark.parametrize("name", CASES)
def test_no_code_and_no_scale_is_another_one(consumed: Path, sources: Callable[[str], Path], name: str) -> None:
    """What the consumer holds once it has loaded the directory, beside what was trained over."""
    seen = load_file(consumed / f"{name}.seen")
    method, model = trained(sources(name), CASES[name], dtype_of(name))
    own = {
        key.replace(".base_layer", ""): value
        for key, value in method.plain_model(model).state_dict().items()
        if ".lora_" not in key
    }
    held = {key.removeprefix("base."): value for key, value in seen.items() if key.startswith("base.")}
    assert held.keys() == own.keys()
    for key, value in own.items():
        assert held[key].dtype == value.dtype and torch.equal(held[key], value), key
    codes = [key for key, value in own.items() if value.dtype in (torch.uint8, torch.int8) and key.endswith(".weight")]
    assert len(codes) == 14
    verdict = check_export(
        ExportLocation("bitsandbytes", consumed / name, {}),
        method.deployed(model, dtype=dtype_of(name)),
        None,
    )
    assert verdict.passed and not verdict.lossy and not verdict.merged, [str(failure) for failure in verdict.failures]
    counts = verdict.figures["counts"]
    assert counts["codes"] == {"compared": 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3), "differing": 0}
    assert counts["scales"]["compared"] > 0 and counts["scales"]["differing"] == 0


@pytest.mark.parametrize("name", ["nf4", "nf4-bf16", "int8"])
def test_it_is_loaded_here_as_its_card_says(consumed: Path, sources: Callable[[str], Path], name: str) -> None:
    loaded = load_export("bitsandbytes", consumed / name, dtype_of(name))
    assert loaded.by.name == "transformers with bitsandbytes and PEFT" and loaded.by.fp32
    seen = load_file(consumed / f"{name}.seen")
    assert torch.equal(logits(loaded.model, seen["ids"]), seen["logits"])
    adapters = {p.dtype for name, p in loaded.model.named_parameters() if "lora" in name}
    assert adapters == {torch.float32}
    card = (consumed / name / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "DIRECTORY", subfolder="adapter")' in card and "codes: as trained" in card


def test_the_directory_is_whole(consumed: Path) -> None:
    out = consumed / "nf4"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "adapter"} <= names
    assert len([name for name in names if name.startswith("model-")]) > 1
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(out / "config.json").stat().st_mode}
    header = json.loads((out / "config.json").read_text())["quantization_config"]
    assert header["llm_int8_skip_modules"] == ["lm_head"] and header["bnb_4bit_compute_dtype"] == "float32"
    # By a hub id PEFT would fetch weights that the adapter never saw.
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert str(consumed) not in "".join(path.read_text() for path in files if path.suffix in (".json", ".md"))


def test_merged_is_another_model_and_says_so(consumed: Path, sources: Callable[[str], Path], tmp_path: Path) -> None:
    method, model = trained(sources("nf4"), CASES["nf4"])
    result = export(method, model, tmp_path / "out", quantize="nf4", allow_requantize=True)
    assert result["codes"] == "lossy" and "adapter" not in result
    assert not (tmp_path / "out" / "adapter").exists()
    seen = load_file(consumed / "merged-nf4.seen")
    expected = logits(model, seen["ids"])
    error = {
        kind: float((load_file(consumed / f"merged-{kind}.seen")["logits"] - expected).norm() / expected.norm())
        for kind in ("nf4", "int8")
    }
    assert 1e-3 < error["int8"] < error["nf4"] < 0.5
    deployed = method.deployed(model, dtype=torch.float32)
    for facts in ({}, result):
        verdict = check_export(ExportLocation("bitsandbytes", consumed / "merged-nf4", facts), deployed, None)
        assert verdict.passed and verdict.lossy and verdict.cells["codes"] == "lossy", verdict.failures


def test_codes_are_not_quantized_again_unasked(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(*trained(sources("nf4"), CASES["nf4"]), tmp_path / "out", quantize="nf4")
    message = str(caught.value)
    assert "quantizes again what is trained over nf4" in message and "export.allow_requantize=true" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "there"),
    [({"base": "none"}, "unquantized weights"), ({"base": "packed", "packed": {"init": "rtn"}}, "packed")],
    ids=["none", "packed"],
)
def test_a_base_of_another_kind_is_refused_or_merged(
    sources: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], there: str
) -> None:
    method, model = trained(sources("nf4"), options)
    with pytest.raises(ExportError) as caught:
        export(method, model, tmp_path / "out")
    message = str(caught.value)
    assert f"trained over: {there}" in message and "export.quantize=nf4" in message
    again = there == "packed"
    assert again == ("export.allow_requantize=true" in message)
    result = export(method, model, tmp_path / "out", quantize="nf4", allow_requantize=again)
    assert result["kind"] == "nf4" and result["double_quant"] and result["quantized_layers"] == 14


@pytest.mark.parametrize(
    ("base", "keys", "fix"),
    [
        ("none", {}, "export.quantize=nf4 merges"),
        ("packed", {}, "export.quantize=nf4 export.allow_requantize=true"),
        ("nf4", {"quantize": "int8"}, "export.allow_requantize=true"),
        ("packed", {"quantize": "nf4"}, "export.allow_requantize=true"),
        ("nf4", {}, None),
        ("int8", {"quantize": "nf4", "allow_requantize": True}, None),
        ("none", {"quantize": "nf4"}, None),
        ("checkpoint", {}, None),
    ],
)
def test_a_base_without_a_place_is_known_before_the_training(
    tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], base: str, keys: Any, fix: str | None
) -> None:
    options = BitsAndBytesOptions(**keys)
    if fix is None:
        options.check_base(base)
        return
    with pytest.raises(ExportError, match=re.escape(fix)):
        options.check_base(base)
    (tmp_path / "text.txt").write_text("a line")
    words = [f"data.train={tmp_path / 'text.txt'}", f"model.path={tiny_llama_dir}", f"run.dir={tmp_path / 'run'}"]
    named = [f"export.{key}={value}" for key, value in keys.items()]
    assert main(["fit", *words, f"method.base={base}", "export.format=bitsandbytes", *named]) == 2
    assert fix in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_an_export_is_a_base_to_train_over_again(consumed: Path, sources: Callable[[str], Path]) -> None:
    for name in ("nf4", "int8"):
        method, model = trained(sources(name), CASES[name])
        options = QLoraOptions(base="checkpoint")
        section = ModelSection(path=str(consumed / name))
        again = load_base(section, options, torch.float32, compute_dtype=torch.float32, device=CPU)
        own = frozen_layers(method.plain_model(model))
        assert frozen_layers(again).keys() == own.keys() and len(own) == 14
        for layer, module in frozen_layers(again).items():
            assert torch.equal(dense_weight(module), dense_weight(own[layer]))


TRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "int4": ({"name": "qat", "weight": {"format": "int4", "group_size": 32}}, "export.format=compressed-tensors"),
    "int5": ({"name": "qat", "weight": {"format": "int5"}}, "export.format=merged"),
    "peqa": ({"name": "peqa", "init": "rtn", "weight": {"format": "int3"}}, "export.format=compressed-tensors"),
    "ptq": ({"name": "ptq", "init": "rtn", "weight": {"format": "int8"}}, "export.format=compressed-tensors"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_codes_that_train_have_another_format(tiny_model: Build, tmp_path: Path, name: str) -> None:
    keys, fix = TRAINED[name]
    section = METHODS.get(keys["name"]).model_validate(keys)
    options = FORMATS.get("bitsandbytes").model_validate({"format": "bitsandbytes"})
    with pytest.raises(ExportError) as early:
        options.check_trained(section.trained_layers())
    method = build_method(section)
    model = method.prepare(tiny_model(), compute_dtype=torch.float32, device=CPU)
    deployed = method.deployed(model, dtype=torch.float32)
    with pytest.raises(ExportError) as late:
        write(deployed, options, tmp_path / "out", tokenizer=None, facts={})
    for caught in (early, late):
        assert fix in str(caught.value) and "bitsandbytes holds NF4, FP4 and LLM.int8()" in str(caught.value)


def test_what_bitsandbytes_has_repacked_is_not_written(sources: Callable[[str], Path], tmp_path: Path) -> None:
    method, model = trained(sources("nf4"), CASES["nf4"])
    layer = method.plain_model(model).get_submodule(UP).get_base_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ExportError, match=f"{UP}: bitsandbytes repacked it"):
        export(method, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
