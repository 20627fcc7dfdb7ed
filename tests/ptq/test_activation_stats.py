"""Second moments of inputs, against a direct computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from qtrain.errors import DataError, ModelError
from qtrain.ptq.activation_stats import Calibration, input_second_moments

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 500, (2, length), generator=generator) for length in lengths]


def test_moments_are_means_over_all_tokens_of_uneven_rows(tiny_llama: LlamaForCausalLM) -> None:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    handles = [
        tiny_llama.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen[name].append(inputs[0].detach().double().flatten(0, -2))
        )
        for name in NAMES
    ]
    moments = input_second_moments(tiny_llama, rows(5, 17), NAMES)
    for handle in handles:
        handle.remove()
    for name in NAMES:
        expected = torch.cat(seen[name]).square().mean(dim=0)
        assert moments[name].dtype == torch.float32
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    input_second_moments(tiny_llama, rows(5), NAMES)
    assert tiny_llama.training
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


@pytest.mark.parametrize("memory", [1, 64 * 64 * 4, 2**30])
def test_hessians_are_those_of_a_direct_computation_however_many_passes(
    tiny_llama: LlamaForCausalLM, memory: int
) -> None:
    names = [n for n, m in tiny_llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        tiny_llama.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: inputs[name].append(given[0].detach().double().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in rows(5, 17):
            tiny_llama(ids)
    for handle in handles:
        handle.remove()
    calibration = Calibration(tiny_llama, rows(5, 17))
    seen = []
    for name, hessian in calibration.hessians(names, memory):
        x = torch.cat(inputs[name])
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hessian.diagonal(), calibration.second_moments([name])[name])
        seen.append(name)
    assert seen == names


# peft 0.21 reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_on_a_4_bit_base_is_observed(tiny_llama: LlamaForCausalLM) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    name = NAMES[0]
    plain = input_second_moments(tiny_llama, rows(9), [name])
    layer = tiny_llama.get_submodule(name)
    frozen = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    frozen.load_state_dict(layer.state_dict())
    tiny_llama.set_submodule(name, frozen.to("cpu"))
    peft = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    moments = input_second_moments(peft.get_base_model(), rows(9), [name])
    torch.testing.assert_close(moments[name], plain[name])


def test_what_cannot_be_calibrated_is_an_error(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="did you mean 'model.layers.0.mlp.up_proj'"):
        input_second_moments(tiny_llama, rows(5), ["model.layers.0.mlp.up_proi"])
    with pytest.raises(DataError, match="no calibration token"):
        input_second_moments(tiny_llama, [], NAMES)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN or inf"):
        input_second_moments(tiny_llama, rows(5), NAMES)
    assert not any(isinstance(m, nn.Linear) and m._forward_pre_hooks for m in tiny_llama.modules())
