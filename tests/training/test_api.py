"""The public names, and a model prepared for somebody else's loop."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import qtrain
from qtrain.errors import ErrorList, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21


@pytest.mark.parametrize("name", qtrain.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qtrain, name) is not None


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        qtrain.train  # noqa: B018
    subpackages = {module.name for module in pkgutil.iter_modules(qtrain.__path__)}
    assert not subpackages & set(qtrain.__all__), "importing a subpackage takes the name's place"
    assert set(qtrain._HOMES) | {"__version__"} == set(qtrain.__all__)


def test_the_tables_name_what_exists() -> None:
    assert qtrain.METHODS.names() == ["qlora", "qat", "peqa", "ptq"]
    assert {"compressed-tensors", "adapter", "merged"} <= set(qtrain.EXPORT_FORMATS.names())


def test_a_prepared_model_trains_in_a_plain_loop(tiny_llama: LlamaForCausalLM) -> None:
    model = qtrain.prepare(tiny_llama, base="nf4", r=4, lora_alpha=8, compute_dtype="fp32", target_modules=["q_proj"])
    assert isinstance(model, PeftModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2 * 4 * (64 + 64)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.arange(5, 37)[None]
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_wrong_keys_are_told_as_on_the_command_line(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ErrorList) as caught:
        qtrain.prepare(tiny_llama, rank=4, lora_alpha=-1)
    message = str(caught.value)
    assert "method.rank is no key" in message and "method.lora_alpha=-1" in message
    with pytest.raises(ModelError, match="matches no linear layer"):
        qtrain.prepare(tiny_llama, target_modules=["query"], compute_dtype="fp32")


def test_a_config_from_python(tmp_path: Path) -> None:
    config = qtrain.load_recipe("demo", "trainer.max_steps=3")
    assert config.trainer["max_steps"] == 3
