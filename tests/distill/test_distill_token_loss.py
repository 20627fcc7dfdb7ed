"""Batches of token ids to a summed loss: which path, and that all give the plain formula on the models' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedModel

from qtrain.distill.cached import CachedLogits, CacheKey
from qtrain.distill.divergence import Objective
from qtrain.distill.head_product import not_a_product
from qtrain.distill.teacher import Teacher, snapshot
from qtrain.distill.token_loss import choose_cached, choose_online
from qtrain.distill.write_cache import write_cache
from qtrain.errors import ModelError
from qtrain.modules.config import QuantizerSection
from qtrain.modules.head import head_factors
from qtrain.modules.quant_linear import QuantLinear

OBJECTIVE = Objective("forward_kl", temperature=1.5, ce_weight=0.2)


def batch(vocab: int = 500) -> dict[str, Tensor]:
    """Two rows, the second padded at its end; some tokens of the first without loss."""
    ids = torch.randint(4, vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = labels[1, 8:] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "rows": torch.tensor([1, 0])}


def capped() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.05, pad_token_id=0
    )
    return Gemma2ForCausalLM(config)


def moved(model: PreTrainedModel, by: float = 0.02) -> PreTrainedModel:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model.train()


def own_loss(student: PreTrainedModel, teacher: PreTrainedModel, judge: Any) -> Tensor:
    """The plain formula on whole logits."""
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    logits, of_teacher = student(**given).logits[:, :-1], teacher(**given).logits[:, :-1]
    return judge(
        logits.flatten(0, 1).double(),
        of_teacher.flatten(0, 1).double(),
        batch()["labels"][:, 1:].flatten(),
        OBJECTIVE,
    )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["llama", "capped"])
def test_online(kind: str, tiny_llama: LlamaForCausalLM, judge: Any) -> None:
    model = tiny_llama if kind == "llama" else capped()
    teacher = Teacher(snapshot(model))
    student = moved(model)
    loss, path = choose_online(student, teacher, OBJECTIVE)
    assert path == (
        "forward_kl from the teacher, plain PyTorch, in chunks"
        if kind == "llama"
        else "whole logits, plain PyTorch: this head is more than a product"
    )
    assert student.training
    value = loss(batch())
    value.backward()
    ours = gradients(student)
    expected = own_loss(student, teacher.model, judge)
    expected.backward()
    theirs = gradients(student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert ours.keys() == theirs.keys() and len(ours) == len(list(student.parameters()))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-3, atol=2e-5, msg=name)


def test_a_capped_teacher_of_a_plain_student(tiny_llama: LlamaForCausalLM, judge: Any) -> None:
    tiny_llama.resize_token_embeddings(500, mean_resizing=False)
    teacher = Teacher(capped())
    loss, path = choose_online(tiny_llama, teacher, OBJECTIVE)
    assert path == "whole logits, plain PyTorch: this head is more than a product"
    torch.testing.assert_close(loss(batch()).double(), own_loss(tiny_llama, teacher.model, judge), rtol=1e-4, atol=0)


def test_a_quantized_head(tiny_llama: LlamaForCausalLM, judge: Any) -> None:
    teacher = Teacher(snapshot(tiny_llama))
    section = QuantizerSection(format="int8", granularity="per_channel")
    per_token = QuantizerSection(format="int8", granularity="per_token")
    tiny_llama.lm_head = QuantLinear.from_linear(tiny_llama.lm_head, weight=section, activation=per_token)
    tiny_llama.train()
    # Its unquantized weight is a hair away: that is seen.
    plain = lambda model, hidden: (hidden, model.lm_head.weight, None)  # noqa: E731
    assert not_a_product(tiny_llama, plain) == "this head is more than a product"
    assert not_a_product(tiny_llama, head_factors) is None
    loss, path = choose_online(tiny_llama, teacher, OBJECTIVE)
    assert path.endswith("in chunks")
    value = loss(batch())
    value.backward()
    ours = gradients(tiny_llama)
    expected = own_loss(tiny_llama, teacher.model, judge)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    for name, gradient in gradients(tiny_llama).items():
        assert (ours[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-7, name


def test_under_autocast_the_head_is_still_seen_to_be_a_product(tiny_llama: LlamaForCausalLM) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not_a_product(tiny_llama, head_factors) is None
        half = lambda model, hidden: (hidden, 1.01 * model.lm_head.weight, None)  # noqa: E731
        assert not_a_product(tiny_llama, half) == "this head is more than a product"


def cached(teacher: Teacher, directory: Path, top_k: int) -> CachedLogits:
    """Rows 0 and 1 are the batch's second (8 tokens) and first (12)."""
    key = CacheKey("f", 1, top_k, OBJECTIVE.temperature)
    both = batch()

    def logits(numbers: list[int]) -> Any:
        rows = [1 - number for number in numbers]
        part = {name: both[name][rows] for name in ("input_ids", "attention_mask")}
        return teacher.row_logits(part, [(12, 8)[row] for row in rows])

    return write_cache(directory, range(2), logits, key)


@pytest.mark.parametrize("kind", ["llama", "capped"])
def test_cached_logits_of_the_whole_vocabulary_are_the_online_teacher(
    kind: str, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    model = tiny_llama if kind == "llama" else capped()
    teacher = Teacher(snapshot(model))
    student = moved(model)
    online, _ = choose_online(student, teacher, OBJECTIVE)
    loss, path = choose_cached(student, cached(teacher, tmp_path / "all", 512), OBJECTIVE)
    assert ("whole logits" in path) == (kind == "capped") and ("cached" in path) == (kind == "llama")
    expected = online(batch())
    expected.backward()
    theirs = gradients(student)
    found = loss(batch())
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # fp16
    for name, gradient in gradients(student).items():
        assert (theirs[name] - gradient).norm() < 5e-3 * gradient.norm(), name
    few, _ = choose_cached(student, cached(teacher, tmp_path / "few", 8), Objective("forward_kl", 1.5))
    whole, _ = choose_online(student, teacher, Objective("forward_kl", 1.5))
    assert 0 < few(batch()) < whole(batch())


def test_another_vocabulary_is_refused(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    teacher = Teacher(capped())
    with pytest.raises(ModelError, match="512 logits, the teacher's 500"):
        choose_online(tiny_llama, teacher, OBJECTIVE)
    with pytest.raises(ModelError, match="512 logits, the teacher's 500"):
        choose_cached(tiny_llama, cached(teacher, tmp_path, 8), OBJECTIVE)


def test_a_model_without_a_decoder_takes_the_whole_logits(tiny_llama: LlamaForCausalLM) -> None:
    teacher = Teacher(snapshot(tiny_llama))
    tiny_llama.get_decoder = None  # type: ignore[method-assign]
    loss, path = choose_online(tiny_llama, teacher, OBJECTIVE)
    assert path.startswith("whole logits, plain PyTorch: 'NoneType'")
    assert torch.isfinite(loss(batch()))
