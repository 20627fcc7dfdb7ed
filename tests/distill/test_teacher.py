"""The frozen full-precision model, and the snapshot it is made of."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from qtrain.distill.config import DistillSection
from qtrain.distill.teacher import Teacher, snapshot, teacher_model
from qtrain.errors import ModelError
from qtrain.models.config import ModelSection


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}


def test_a_snapshot_shares_nothing_and_stays_as_it_is(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    tiny_llama(**batch()).loss.backward()
    copied = snapshot(tiny_llama)
    before = copy.deepcopy(copied.state_dict())
    own = {tensor.data_ptr() for tensor in (*tiny_llama.parameters(), *tiny_llama.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers())}
    assert not any(p.requires_grad or p.grad is not None for p in copied.parameters())
    assert not any(module.training for module in copied.modules()) and tiny_llama.training
    assert all(p.requires_grad and p.grad is not None for p in tiny_llama.parameters())
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.add_(1)
    tiny_llama.model.layers[0].mlp.up_proj = nn.Linear(64, 128)
    assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())


def test_a_snapshot_in_bf16_keeps_ties_and_buffers(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    copied = snapshot(tiny_llama, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(copied.lm_head.weight, tiny_llama.lm_head.weight.bfloat16())
    with torch.no_grad():
        expected = tiny_llama(**batch()).logits
        torch.testing.assert_close(copied(**batch()).logits.float(), expected, rtol=0, atol=0.02)


def test_a_module_that_holds_it_does_not_own_it(tiny_llama: LlamaForCausalLM) -> None:
    student = nn.Linear(2, 2)
    student.teacher = Teacher(tiny_llama)  # type: ignore[assignment]
    assert len(list(student.parameters())) == 2 and set(student.state_dict()) == {"weight", "bias"}
    assert len(list(student.modules())) == 1
    student.to(torch.float64)
    student.train()
    assert tiny_llama.dtype == torch.float32 and not tiny_llama.training


def test_what_it_gives_is_the_models_without_a_graph(tiny_llama: LlamaForCausalLM) -> None:
    teacher = Teacher(tiny_llama.train()).to("cpu")
    with torch.no_grad():
        expected = tiny_llama(**batch())
    assert torch.equal(teacher.logits(batch()), expected.logits)
    hidden = teacher.hidden(batch())
    assert not hidden.requires_grad and teacher.device == torch.device("cpu")
    assert torch.equal(F.linear(hidden, tiny_llama.lm_head.weight), expected.logits)
    assert not any(p.requires_grad for p in tiny_llama.parameters())


def test_it_runs_in_the_context_it_was_given(tiny_llama: LlamaForCausalLM) -> None:
    teacher = Teacher(tiny_llama, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert teacher.logits(batch()).dtype == torch.bfloat16
    assert [row.dtype for row in teacher.row_logits(batch(), [9, 6])] == [torch.bfloat16] * 2
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("capped", [False, True])
def test_logits_row_by_row(capped: bool, tiny_llama: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.05, pad_token_id=0
    )
    teacher = Teacher(Gemma2ForCausalLM(config) if capped else tiny_llama)
    assert teacher.not_a_product == ("this head is more than a product" if capped else None)
    with torch.no_grad():
        expected = teacher.model(**batch()).logits
    rows = list(teacher.row_logits(batch(), [9, 6]))
    assert [len(row) for row in rows] == [9, 6] and not any(row.requires_grad for row in rows)
    for row, whole in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, whole[: len(row)], rtol=1e-5, atol=1e-6)
    assert torch.is_grad_enabled()


def test_which_model_teaches(tiny_llama: LlamaForCausalLM, tiny_llama_dir: Path) -> None:
    base = ModelSection(path="elsewhere", revision="branch", attention="eager")
    own = teacher_model(DistillSection(loss="forward_kl"), tiny_llama, base, torch.float32)
    assert own is not tiny_llama and torch.equal(own.lm_head.weight, tiny_llama.lm_head.weight)
    named = DistillSection(loss="forward_kl", teacher=str(tiny_llama_dir))
    loaded = teacher_model(named, tiny_llama, base, torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="nowhere"):
        teacher_model(DistillSection(loss="jsd", teacher="./nowhere"), tiny_llama, base, torch.float32)
