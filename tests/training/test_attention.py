"""Which attention a run takes, that it is said, and that training is the same by document as under a mask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.modules import documents
from qtrain.modules.documents import attends_by_document
from qtrain.training import attention
from qtrain.training.attention import Attention, Shape, shape_of
from qtrain.training.fit import fit
from qtrain.training.recompute_retry import MicroBatch
from qtrain.training.run_directory import RunDirectory

CPU = torch.device("cpu")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU."""
    monkeypatch.setattr(attention, "on_gpu", lambda device: True)
    yield


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def chosen(model: LlamaForCausalLM, *words: str) -> Attention:
    return Attention(model, load_recipe(None, "model.path=none", *words), CPU, torch.float32)


def test_a_cpu_keeps_masks() -> None:
    model = model_of()
    assert str(chosen(model)) == "sdpa" and not attends_by_document(model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "sdpa; packed rows document by document, by torch's flash attention"),
        (("model.attention=sdpa",), "sdpa"),
        (("data.packing=false",), "sdpa"),
        (
            ("run.cuda_graphs=true", "method.name=qat"),
            "sdpa; packed rows under a mask of pairs: graphs replay one shape",
        ),
        (
            ("method.name=qat", "method.kv_cache.format=int8", "method.kv_cache.residual=8"),
            "sdpa; packed rows under a mask of pairs: keys in full precision take scores in memory",
        ),
    ],
)
def test_what_is_chosen_is_said(everywhere: None, words: tuple[str, ...], said: str) -> None:
    model = model_of()
    found = chosen(model, *words)
    found.prove(model, 64)
    assert str(found) == said
    assert attends_by_document(model) == ("document by document" in said)


@pytest.mark.parametrize(
    ("dtype", "dropout", "said"),
    [(torch.float32, 0.0, "float32 scores"), (torch.bfloat16, 0.1, "dropout of scores")],
)
def test_what_each_layer_would_fall_back_for_is_said(dtype: torch.dtype, dropout: float, said: str) -> None:
    model = model_of()
    model.config.attention_dropout = dropout
    found = Attention(model, load_recipe(None, "model.path=none"), torch.device("cuda"), dtype)
    assert str(found) == f"sdpa; packed rows under a mask of pairs: {said}" and not attends_by_document(model)


def test_a_model_that_was_trained_so_before_is_again(everywhere: None) -> None:
    model = model_of()
    first, second = chosen(model), chosen(model)
    assert str(first) == str(second) == "sdpa; packed rows document by document, by torch's flash attention"


def test_logits_that_differ_bring_the_masks_back(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = documents.document_attention

    def leaking(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *rest: Any) -> Tensor:
        return own(query, key, value, ends[[0, -1]], *rest)

    monkeypatch.setattr(documents, "document_attention", leaking)
    model = model_of()
    found = chosen(model)
    assert attends_by_document(model)
    found.prove(model, 64)
    assert not attends_by_document(model)
    assert str(found).startswith("sdpa; packed rows under a mask of pairs: logits differ by ")


def test_the_shape_is_that_of_a_micro_batch() -> None:
    config = load_recipe(None, "model.path=none", "data.batch_size=3", "data.max_length=77")
    assert shape_of(model_of(), config) == Shape(3, 4, 2, 77, 8)


def test_the_fastest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {SDPBackend.CUDNN_ATTENTION: 2.0, SDPBackend.FLASH_ATTENTION: 1.234}
    monkeypatch.setattr(attention, "back_end_times", lambda *given: times)
    found = chosen(model_of())
    found.measure(Shape(1, 4, 2, 8, 8), torch.bfloat16, torch.device("cuda"))
    assert str(found) == "sdpa by flash 1.23 ms, cuDNN 2.00 ms a layer, the first taken"
    with found.in_order():
        priority = torch._C._get_sdp_priority_order()
    first = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert priority[:4] == [int(one) for one in first]
    assert torch._C._get_sdp_priority_order() != priority


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*validation_step. but have no .val_dataloader")
@pytest.mark.parametrize("method", ["qlora", "qat"])
def test_a_run_by_document_learns_as_under_masks(
    method: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (json.dumps({"text": f"{'word ' * (number % 7 + 1)}{number}"}) for number in range(80))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(texts))
    calls: list[int] = []
    own = documents.document_attention

    def noted(*given: Any) -> Tensor:
        calls.append(len(given[3]) - 1)
        return own(*given)

    monkeypatch.setattr(documents, "document_attention", noted)

    def trained(name: str) -> dict[str, Any]:
        words = (f"method.name={method}", f"model.path={tiny_llama_dir}", f"data.train={data}", "data.batch_size=2")
        more = ("data.max_length=48", "trainer.max_steps=4", "optimizer.name=adamw", "trainer.accelerator=cpu")
        config = load_recipe(None, *words, *more, f"run.dir={tmp_path / name}", "run.recompute=full")
        fit(config, RunDirectory.of(config))
        found: dict[str, Any] = json.loads((tmp_path / name / "fit.json").read_text())
        return found

    masked = trained("masked")
    assert not calls and "attention sdpa" in masked["model"]
    monkeypatch.setattr(attention, "on_gpu", lambda device: True)
    found = trained("by_document")
    assert found["train_loss"] == pytest.approx(masked["train_loss"], rel=1e-5)
    assert max(calls) > 4 and "attention sdpa; packed rows document by document" in " ".join(found["model"])


def test_shares_of_a_batch_are_told_no_documents_of_the_whole() -> None:
    ids = torch.arange(24).view(4, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]] * 2)
    batch = documents.with_documents({"input_ids": ids, "labels": ids, "position_ids": positions})
    assert len(batch[documents.LONGEST]) == 6
    shares = MicroBatch.of(batch).parts(2)
    assert [documents.documents_of(share) for share in shares] == [None, None]
    assert all(len(share["position_ids"]) == 2 for share in shares)


@pytest.mark.gpu
def test_on_a_gpu_back_ends_are_timed() -> None:
    times = attention.back_end_times(Shape(2, 8, 2, 256, 64), torch.bfloat16, torch.device("cuda"))
    assert len(times) >= 2 and all(0 < time < 100 for time in times.values())
