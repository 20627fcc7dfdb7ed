"""The whole chain on a tiny Llama, through the command line: fit, measure, ask, export, and do it again."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from qtrain.cli import main
from qtrain.config.compose import load_recipe
from qtrain.training.run_directory import RunDirectory
from qtrain.training.trained import trained_subject

# PEFT 0.21 asks transformers 5.23 by the old name; the command line silences it, PEFT alone does not.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_chats(path: Path, count: int, first: int) -> Path:
    rows = [
        {"prompt": f"What is the capital of country {n}?", "completion": f"City {n % 3}, and the dog {'on ' * (n % 4)}"}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> list[str]:
    data = tmp_path_factory.mktemp("data")
    held_out = write_chats(data / "held_out.jsonl", 6, 100)
    return [
        f"model.path={tiny_llama_dir}",
        f"data.train={write_chats(data / 'train.jsonl', 24, 0)}",
        f"data.validation={held_out}",
        f"data.test={held_out}",
        f"data.predict={write_chats(data / 'predict.jsonl', 5, 200)}",
        "data.max_length=64",
        "data.batch_size=2",
        "method.r=4",
        "method.lora_alpha=8",
        "method.compute_dtype=fp32",
        "optimizer.lr=1e-2",
        "optimizer.warmup=2",
        "trainer.max_steps=6",
        "trainer.accumulate_grad_batches=2",
        "trainer.accelerator=cpu",
        "run.save_every=2",
        "run.samples=['What is the capital?']",
        "generate.max_new_tokens=4",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "first"
    assert main(["fit", *words, f"run.dir={path}"]) == 0
    return path


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(run: Path) -> Ask:
    """Call a verb on the run; its result file."""

    def call(verb: str, *words: str) -> dict[str, Any]:
        assert main([verb, f"run.dir={run}", *words]) == 0
        return read(run / f"{verb}.json")

    return call


def test_fit_leaves_everything(run: Path) -> None:
    files = {name.split("/")[0] for name in contents(run)}
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "data.json", "fit.json", "report.html"} <= files
    kept = [f"step-{step:06}.ckpt{end}" for step in (4, 6) for end in ("", ".json")]
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == kept
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(contents(run / "adapter"))
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert "What is the capital?" in json.dumps(sample)


def test_fit_tells_what_happened(run: Path, tiny_llama_dir: Path) -> None:
    fit = read(run / "fit.json")
    assert fit["steps"] == 6 == len(losses(run))
    assert fit["val_loss_after"] < fit["val_loss_before"] - 0.1
    assert fit["val_perplexity_after"] == pytest.approx(torch.tensor(fit["val_loss_after"]).exp().item(), rel=1e-4)
    assert float(losses(run)[-1]) == pytest.approx(fit["train_loss"], rel=1e-5)
    # rank 4 on q, k, v, o, gate, up, down of two layers
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert fit["trained_parameters"] == 2 * 4 * sum(map(sum, widths))
    assert fit["base"] == str(tiny_llama_dir)


def test_checkpoints_hold_what_trains_alone(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "step-000006.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert len(checkpoint["state_dict"]) == 2 * 14
    assert all("lora_" in name for name in checkpoint["state_dict"])


def test_validate_measures_the_trained_model(ask: Ask, run: Path) -> None:
    found, fit = ask("validate"), read(run / "fit.json")
    assert found["loss"] == pytest.approx(fit["val_loss_after"], abs=1e-5)
    assert found["model"] == str(run)
    assert ask("test")["loss"] == found["loss"]  # the same file


def test_validate_measures_another_model(ask: Ask, run: Path, tiny_llama_dir: Path) -> None:
    fit, base = read(run / "fit.json"), ask("validate", f"model.path={tiny_llama_dir}")
    assert base["model"] == str(tiny_llama_dir)
    # the base as it is stored: off from its NF4 copy by the rounding, far from the trained model
    assert base["loss"] == pytest.approx(fit["val_loss_before"], abs=0.02)
    assert base["loss"] != pytest.approx(fit["val_loss_before"], abs=1e-6)


def test_a_share_of_the_validation(ask: Ask) -> None:
    assert ask("validate", "trainer.limit_val_batches=1")["tokens"] < ask("validate")["tokens"]


def test_predict_answers_every_sample(ask: Ask, run: Path) -> None:
    found = ask("predict")
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert found["samples"] == len(rows) == 5
    assert ["country 203" in row["prompt"] for row in rows] == [False, False, False, True, False]
    assert rows[0]["reference"].startswith("City 2")
    assert found["exact"] == sum(row["prediction"].strip() == row["reference"].strip() for row in rows) / 5


def test_generate_is_the_run_beside_its_base(ask: Ask, run: Path, tiny_llama_dir: Path) -> None:
    prompts = "generate.prompt=[The dog,A scale]"
    answers = ask("generate", prompts, f"generate.beside={tiny_llama_dir}")["answers"]
    assert set(answers) == {str(run), str(tiny_llama_dir)}
    assert [row["prompt"] for row in answers[str(run)]] == ["The dog", "A scale"]
    assert all(1 <= len(row["tokens"]) <= 4 for rows in answers.values() for row in rows)
    assert answers[str(run)] != answers[str(tiny_llama_dir)]
    assert ask("generate", prompts)["answers"][str(run)] == answers[str(run)]


def test_generate_samples_by_its_seed(ask: Ask, run: Path) -> None:
    def tokens(seed: int) -> list[int]:
        found = ask("generate", "generate.prompt=The dog", "generate.strategy=sample", f"generate.seed={seed}")
        assert found["decoding"]["strategy"] == "sample"
        answer: list[int] = found["answers"][str(run)][0]["tokens"]
        return answer

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


def test_export_to_int4(ask: Ask, run: Path) -> None:
    found = ask("export", "export.rounding=nearest")["compressed-tensors"]
    directory = run / "export" / "compressed-tensors"
    assert found["directory"] == str(directory)
    assert found["rounding"] == "nearest" and found["quantized_layers"] == 14
    assert 0 < found["kl"] < 1e-3 and found["top1"] > 0.9
    assert found["reference_perplexity"] == pytest.approx(read(run / "fit.json")["val_perplexity_after"], rel=1e-3)
    # Measured again by another path: loaded by transformers, over the same held-out text.
    again = ask("validate", f"model.path={directory}")
    assert again["perplexity"] == pytest.approx(found["candidate_perplexity"], rel=1e-4)


def test_export_merged_is_the_trained_model(ask: Ask, run: Path, tmp_path: Path) -> None:
    found = ask("export", "export.format=merged")["merged"]
    assert found["base"] == "dequantized"
    assert found["kl"] < 1e-6 and found["top1"] == 1.0
    assert found["alternative"]["base"] == "original" and found["alternative"]["kl"] > found["kl"]

    other = ask("export", "export.format=merged", "export.base=original", f"export.dir={tmp_path / 'other'}")["merged"]
    assert other["kl"] == pytest.approx(found["alternative"]["kl"], rel=1e-3)
    assert other["alternative"]["base"] == "dequantized" and other["alternative"]["kl"] < 1e-6
    assert other["directory"] == str(tmp_path / "other")


def test_merged_into_the_original_is_the_base_and_the_adapter(
    ask: Ask, run: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "merged"
    ask("export", "export.format=merged", "export.base=original", f"export.dir={directory}", "export.evaluate=false")
    merged, base = load_file(directory / "model.safetensors"), load_file(tiny_llama_dir / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    key = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{key}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{key}.weight"], base[f"{key}.weight"] + 8 / 4 * b @ a, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_export_of_the_adapter(ask: Ask, run: Path) -> None:
    found = ask("export", "export.format=adapter")
    assert {"adapter", "compressed-tensors", "merged"} >= set(found) >= {"adapter"}
    weights = load_file(run / "export" / "adapter" / "adapter_model.safetensors")
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)


def test_peft_loads_the_adapter_over_its_own_nf4_base(run: Path, tiny_llama_dir: Path) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    base = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    # In training mode: on some processors bitsandbytes rounds the scales of a model in eval mode. No dropout here.
    theirs = PeftModel.from_pretrained(base, run / "adapter").train()
    ours = trained_subject(load_recipe(run / "config.yaml"), RunDirectory(run)).model
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_fit_is_refused_and_touches_nothing(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(["fit", *words, f"run.dir={run}", "optimizer.lr=1e-4"]) == 2
    message = capsys.readouterr().err
    assert "an earlier run lies here" in message and "run.overwrite=true" in message
    assert contents(run) == before


def test_a_run_repeats_from_its_own_config(run: Path) -> None:
    assert main(["fit", f"recipe={run / 'config.yaml'}", "run.name=again"]) == 0
    again = run.with_name("again")
    assert losses(again) == losses(run)
    assert contents(again)["adapter/adapter_model.safetensors"] == contents(run)["adapter/adapter_model.safetensors"]
    assert read(again / "fit.json")["val_loss_after"] == read(run / "fit.json")["val_loss_after"]


def test_overwrite_replaces_the_run(run: Path) -> None:
    again = run.with_name("replaced")
    assert main(["fit", f"recipe={run / 'config.yaml'}", "run.name=replaced", "trainer.max_steps=4"]) == 0
    assert main(["export", f"run.dir={again}", "export.format=adapter"]) == 0
    words = [f"recipe={again / 'config.yaml'}", "run.overwrite=true", "trainer.max_steps=2"]
    assert main(["fit", *words]) == 0
    assert read(again / "fit.json")["steps"] == 2
    kept = sorted(file.name for file in (again / "checkpoints").iterdir())
    assert kept == ["step-000002.ckpt", "step-000002.ckpt.json"]
    assert losses(again) == losses(run)[:2]
    assert not (again / "export").exists() and not (again / "export.json").exists()


def test_a_finished_run_goes_on(run: Path) -> None:
    config = run.with_name("again2")
    assert main(["fit", f"recipe={run / 'config.yaml'}", f"run.dir={config}", "trainer.max_steps=4"]) == 0
    assert main(["fit", f"run.dir={config}", "run.resume=true", "trainer.max_steps=6"]) == 0
    assert losses(config) == losses(run)
    assert read(config / "fit.json")["val_loss_before"] == read(run / "fit.json")["val_loss_before"]


def test_the_tokenizer_of_an_export_is_the_models(ask: Ask, run: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ask("export", "export.format=merged", "export.evaluate=false")
    tokenizer = AutoTokenizer.from_pretrained(run / "export" / "merged")
    chat = [{"role": "user", "content": "The dog"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tiny_tokenizer.apply_chat_template(
        chat, tokenize=False
    )
