"""Which path computes the loss, and that both compute the model's own."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedModel

from qtrain.modules.token_loss import choose_loss, chunked_loss, plain_loss


def batch(vocab: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def own_loss(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' mean loss times the number of tokens it is a mean of."""
    return model(**given).loss * (given["labels"][:, 1:] != -100).sum()


@pytest.fixture
def tiny_gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.05,  # far below the logits of random weights: the cap shows
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


def test_llama_takes_the_chunks(tiny_llama: LlamaForCausalLM) -> None:
    loss, path = choose_loss(tiny_llama)
    given = batch(512)
    assert path == "head and cross-entropy in chunks"
    torch.testing.assert_close(loss(given), own_loss(tiny_llama, given), rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked_loss(tiny_llama, given), plain_loss(tiny_llama, given), rtol=1e-6, atol=0)


def test_weights_in_fp32_under_autocast_take_the_chunks(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(20)  # as large as trained ones: what bf16 rounds shows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, path = choose_loss(tiny_llama)
    assert path == "head and cross-entropy in chunks"


def test_a_capped_head_takes_the_whole_logits(tiny_gemma: Gemma2ForCausalLM) -> None:
    loss, path = choose_loss(tiny_gemma)
    given = batch(64)
    assert path == "whole logits: this head is more than a product"
    torch.testing.assert_close(loss(given), own_loss(tiny_gemma, given), rtol=1e-5, atol=0)
    assert not torch.allclose(chunked_loss(tiny_gemma, given), own_loss(tiny_gemma, given), rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_mode_and_gradients(tiny_llama: LlamaForCausalLM, training: bool) -> None:
    tiny_llama.train(training)
    choose_loss(tiny_llama)
    assert tiny_llama.training is training
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_a_model_without_a_decoder_takes_the_whole_logits(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.get_decoder = None  # type: ignore[method-assign]
    loss, path = choose_loss(tiny_llama)
    assert path.startswith("whole logits: 'NoneType'")
    given = batch(512)
    torch.testing.assert_close(loss(given), own_loss(tiny_llama, given), rtol=1e-5, atol=0)


def test_padding_is_attended_to_as_the_mask_says(tiny_llama: LlamaForCausalLM) -> None:
    given = batch(512)
    alone = chunked_loss(tiny_llama, {key: value[1:] for key, value in given.items()})
    padded = {
        "input_ids": torch.cat((given["input_ids"][1:], torch.full((1, 3), 3)), dim=1),
        "labels": torch.cat((given["labels"][1:], torch.full((1, 3), -100)), dim=1),
        "attention_mask": torch.tensor([[1] * 12 + [0] * 3]),
    }
    torch.testing.assert_close(chunked_loss(tiny_llama, padded), alone, rtol=1e-6, atol=0)
