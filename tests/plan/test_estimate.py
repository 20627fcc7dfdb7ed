"""What a plan says a step takes, against an allocator that counts the step itself."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.data.datamodule import LanguageData
from qtrain.distill import chunked_loss
from qtrain.training import live_bytes, recompute_budget
from qtrain.training.live_bytes import LiveBytes, ShapeBytes, place, tensor_bytes
from qtrain.training.module import LanguageModule
from qtrain.training.plan.estimate import Estimator
from qtrain.training.plan.plan import make_plan
from qtrain.training.plan.shapes import held, prepared_shapes
from qtrain.training.recompute_budget import taught_head_bytes
from qtrain.training.trainer import trainer_arguments

CPU = torch.device("cpu")
NARROW = ["method.weight.format=int4", "method.weight.group_size=32"]
METHODS = {
    "nf4": ["method.base=nf4"],
    "nf4, scales in fp32": ["method.base=nf4", "method.double_quant=false"],
    "int8": ["method.base=int8"],
    "lora": ["method.base=none", "method.lora_dropout=0.1"],
    "packed": ["method.base=packed", "method.packed.init=rtn"],
    "qat": ["method.name=qat", *NARROW],
    "qat of everything": [
        *["method.name=qat", "method.weight.format=int4", "method.weight.range=learned"],
        *["method.activation.format=int8", "method.kv_cache.format=int8"],
    ],
    "qat by adapters": ["method.name=qat", *NARROW, "method.lora.r=4", "method.embedding.format=int8"],
    "peqa": ["method.name=peqa", "method.init=rtn", "method.weight.symmetric=false", "method.weight.group_size=32"],
}
STEPS = {
    "nf4": [],
    "lora": ["run.recompute=full"],
    "qat": ["data.packing=false", "run.recompute=selective", "trainer.accumulate_grad_batches=2"],
    "peqa": ["optimizer.name=adamw_8bit"],
    "qat by adapters": ["distill.loss=forward_kl"],
}
ignored = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # peft 0.21 on transformers 5.23
    "ignore:.*MatMul8bitLt",
    "ignore:.*val_dataloader",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    words = "The quick brown fox jumps over the lazy dog. "
    path.write_text("\n".join(f'{{"text": "{words * (1 + i % 9)}"}}' for i in range(120)), encoding="utf-8")
    return path


class Allocations(Callback):
    """The most that the CPU's allocator had given out at once, by torch's profiler, over what was there before."""

    def __init__(self) -> None:
        self.peak = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not batch_idx:
            gc.collect()  # what an earlier test left would count as given back
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._profile.__exit__(None, None, None)
        now = 0
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, now)


@ignored
@pytest.mark.parametrize("name", METHODS)
def test_shapes_store_what_a_prepared_model_stores(name: str, tiny_llama_dir: Path) -> None:
    config = load_recipe(None, f"model.path={tiny_llama_dir}", "data.packing=false", *METHODS[name])
    shapes = prepared_shapes(config.model, config.method, torch.float32, torch.float32)
    assert all(tensor.is_meta or tensor.numel() < 100 for tensor in held(shapes.model))
    model = LanguageModule(config).build(CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert tensor_bytes(shapes.trained) == tensor_bytes(trained)
    places = {place(p) for p in trained}
    assert shapes.base_bytes == tensor_bytes(tensor for tensor in held(model) if place(tensor) not in places)


@ignored
@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_is_the_allocators_peak(name: str, tiny_llama_dir: Path, text: Path) -> None:
    words = (f"model.path={tiny_llama_dir}", f"data.train={text}", "data.max_length=128", "trainer.accelerator=cpu")
    config = load_recipe(None, *words, "trainer.max_steps=3", *METHODS[name], *STEPS[name])
    module = LanguageModule(config)
    data = LanguageData(config.data, module.tokenizer)
    data.setup("fit")
    plan = make_plan(config, data, CPU)
    counted = Allocations()
    arguments = trainer_arguments(config) | {"enable_progress_bar": False}
    trainer = L.Trainer(**arguments, logger=False, enable_checkpointing=False, callbacks=[counted])
    trainer.fit(module, datamodule=data)
    teacher = [] if module.teacher is None else held(module.teacher.model)
    measured = counted.peak + tensor_bytes([*held(module), *teacher])
    assert plan.unknown is None and plan.peak is not None and plan.fits
    assert plan.peak.total == pytest.approx(measured, rel=0.1)
    assert sum(count for _, count in plan.parts()) == plan.peak.total


@ignored
@pytest.mark.parametrize("name", ["nf4", "int8", "lora", "qat of everything", "peqa", "qat by adapters"])
def test_shapes_take_what_numbers_take(name: str, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large layer is never run on a CPU: its operations give the same count on shapes alone."""
    taught = STEPS[name] if name == "qat by adapters" else []
    config = load_recipe(None, f"model.path={tiny_llama_dir}", *METHODS[name], *taught)
    ids = torch.arange(200).view(2, 100)
    batch = {"input_ids": ids, "labels": ids, "position_ids": (torch.arange(100) % 50).expand(2, -1)}
    found = []
    for most in (float("inf"), 0.0):
        monkeypatch.setattr(live_bytes, "REAL_FLOPS", most)
        found.append(Estimator(config, CPU).step(batch, config.optimizer, accumulates=False))
    assert found[0] == found[1]


@ignored
@pytest.mark.parametrize("chunk_rows", [128, 10**6], ids=["chunks", "one"])
@pytest.mark.parametrize(("loss", "matrices"), [("forward_kl", 5), ("reverse_kl", 5), ("jsd", 7)])
def test_a_student_s_head_is_counted_with_what_its_loss_makes_of_two_logits(
    loss: str, matrices: int, chunk_rows: int, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both products, and three or five matrices beside them; the formula of run.recompute=auto says no less."""
    words = [f"model.path={tiny_llama_dir}", f"distill.loss={loss}", *METHODS["qat"]]
    config = load_recipe(None, *words)
    ids = torch.arange(1500).view(3, 500) % 500
    batch = {"input_ids": ids, "labels": ids}
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 512 * chunk_rows)
    estimator = Estimator(config, CPU)
    counted = estimator.step(batch, config.optimizer, accumulates=False).head
    logits = 4 * 512 * min(chunk_rows, 3 * 499)
    around = 1500 * 64 * 4 * 8 + 512 * 64 * 4 * 3  # hidden states and their gradients, the head's gradient
    assert matrices * logits < counted < matrices * logits + around
    model = estimator.one.plain
    found = taught_head_bytes(model, 1500, config.distill, whole=False)
    assert 0.95 * counted < found < 1.3 * counted
    assert taught_head_bytes(model, 1500, config.distill, whole=True) > found + 4 * 1500 * 512 * 4
    monkeypatch.setattr(recompute_budget, "one_pass", lambda *_: True)  # the student's and the teacher's alone
    fused = taught_head_bytes(model, 1500, config.distill, whole=False)
    assert found - fused == pytest.approx((matrices - 2) * logits, rel=0.01)
    cached = config.distill.model_copy(update={"teacher_logits": "cached"})
    assert taught_head_bytes(model, 1500, cached, whole=False) == found


@ignored
@pytest.mark.parametrize("teacher_logits", ["online", "cached"])
def test_whole_logits_of_a_student_and_its_teacher(teacher_logits: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=5.0)).save_pretrained(tmp_path)
    ids = torch.arange(800).view(2, 400) % 500
    found = []
    for loss in ("none", "forward_kl"):
        words = [f"model.path={tmp_path}", f"distill.loss={loss}", *METHODS["qat"]]
        words += [f"distill.teacher_logits={teacher_logits}", "distill.top_k=8"] if loss != "none" else []
        config = load_recipe(None, *words)
        estimator = Estimator(config, CPU)
        assert estimator.one.whole_logits
        found.append(estimator.step({"input_ids": ids, "labels": ids}, config.optimizer, accumulates=False).head)
    assert found[1] > found[0] + (2 if teacher_logits == "online" else 1) * 4 * 800 * 500


def test_live_bytes_come_and_go() -> None:
    before = torch.zeros(1000)
    for counter in (LiveBytes(), ShapeBytes()):
        with counter:
            one = before + 1
            view = one[:10].detach()
            assert counter.now == 4000
            one.add_(before)
            del one
            assert counter.now == 4000
            del view
            two = (before * 2).sum()
            assert (counter.now, counter.peak) == (4, 4004)
            del two
    with ShapeBytes(chosen=7):
        assert before.nonzero().shape == (7, 1)


@ignored
def test_a_7b_shape_is_planned_in_seconds_without_its_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Of Llama-2-7B in NF4 with double quantization the QLoRA paper's arithmetic gives 4.127 bits a weight."""
    config = load_recipe(None, f"model.path={tiny_llama_dir}", "method.base=nf4", "method.r=64", "model.dtype=bf16")
    config.method.compute_dtype = "bf16"
    large = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    large |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    path = tmp_path / "large"
    path.mkdir()
    text = (tiny_llama_dir / "config.json").read_text(encoding="utf-8")
    (path / "config.json").write_text(json.dumps(json.loads(text) | large), encoding="utf-8")
    (path / "model.safetensors").touch()
    config.model.path = str(path)
    shapes = prepared_shapes(config.model, config.method, torch.bfloat16, torch.bfloat16)
    linears, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert shapes.base_bytes == pytest.approx(linears * 4.127 / 8 + others * 2, rel=1e-3)
    assert sum(p.numel() for p in shapes.trained) == 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))


@ignored
def test_what_would_fit_does(tiny_llama_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (f"model.path={tiny_llama_dir}", f"data.train={text}", "data.max_length=256", "data.batch_size=4")
    config = load_recipe(None, *words, *METHODS["lora"])
    data = LanguageData(config.data, LanguageModule(config).tokenizer)
    data.setup("fit")
    whole = make_plan(config, data, CPU)
    assert whole.peak is not None and whole.fits and not whole.changes
    free = int(whole.peak.total * 0.9)
    monkeypatch.setattr("qtrain.training.plan.plan.free_memory", lambda device: free)
    short = make_plan(config, data, CPU)
    assert short.fits is False and short.changes
    assert short.changes[0].words == "data.batch_size=2 trainer.accumulate_grad_batches=2"
    for change in short.changes:
        changed = load_recipe(None, *words, *METHODS["lora"], *change.words.split())
        again = LanguageData(changed.data, data.tokenizer)
        again.setup("fit")
        plan = make_plan(changed, again, CPU)
        assert plan.fits and plan.peak is not None
        assert plan.peak.total <= change.total * 1.02
        if "max_length" not in change.words:
            assert plan.steps.rows == whole.steps.rows
