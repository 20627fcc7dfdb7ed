"""Blocks over weights in fp8: near what they are without, for each base, and said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.kernels.fp8_product import fp8_rows
from qtrain.modules import fused_blocks
from qtrain.modules.fp8_weight import InFp8
from qtrain.modules.frozen_linear import quantize_base
from qtrain.modules.frozen_weight import Dense
from qtrain.modules.fused_blocks import fuse_blocks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
IDS = torch.arange(2, 42).view(2, 20)


def adapted(base: str, wide: int = 192, **keys: float) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": wide, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    model = LlamaForCausalLM(config)
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in name
    ]
    if base != "none":
        quantize_base(model, base, double_quant=True, compute_dtype=torch.float32, device=torch.device("cpu"))
    found = get_peft_model(model, LoraConfig(r=4, target_modules=names, **keys))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return found.train()


def weights_of(model: torch.nn.Module) -> list[Any]:
    """Of all members of blocks, whichever layer's forward a block hangs on."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    blocks = [getattr(forward, "block", forward) for forward in forwards]
    members = {id(member): member for block in blocks for member in getattr(block, "members", ())}
    return [member.frozen for member in members.values()]


def step(model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_a_step_in_fp8_is_near_the_exact_one(base: str) -> None:
    model = adapted(base)
    wanted = step(model)
    words = fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)
    assert words.endswith("14 frozen weights as e4m3 rows on the same numbers in fp32: no fp8 units here")
    found = step(model)
    apart = {name: float((found[name] - own).norm() / own.norm()) for name, own in wanted.items()}
    assert 1e-3 < apart["logits"] < 0.1 and max(apart.values()) < 0.25
    model.eval()
    with torch.no_grad():  # what is evaluated and exported is not rounded
        again = model(input_ids=IDS).logits
    model.train()
    assert (again - wanted["logits"]).norm() < 1e-5 * again.norm()


def test_widths_that_fp8_units_do_not_take_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.kernels import fp8_product

    def words(**sizes: int) -> str:
        with monkeypatch.context() as patched:
            model = adapted("none", **sizes)
            for module in (fused_blocks, fp8_product):  # as if on a GPU that has units
                patched.setattr(module, "has_fp8", lambda device: True)
            return fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)

    assert words(wide=200).endswith(
        "8 frozen weights as e4m3 rows on fp8 tensor cores; "
        "6 as the same numbers in fp32: 128 x 200, 200 x 128 are no multiples of 16"
    )
    assert words().endswith("14 frozen weights as e4m3 rows on fp8 tensor cores")
    model = adapted("none", wide=200)  # without units none is another's
    assert fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True).endswith("no fp8 units here")


def test_the_gradient_of_the_input_takes_the_same_codes() -> None:
    layer = torch.nn.Linear(32, 48)
    weight = InFp8(Dense(layer))
    x, dy = torch.randn(7, 32), torch.randn(7, 48)
    y = weight.product(x, {})
    assert (y - layer(x)).norm() < 0.06 * y.norm()
    dx = weight.input_gradient(dy)
    exact = dy @ layer.weight
    assert (dx - exact).norm() < 0.06 * exact.norm()
    into = torch.randn(7, 32)
    assert torch.allclose(weight.input_gradient(dy, into.clone()), into + dx, atol=1e-6)


@torch.no_grad()
def test_codes_come_straight_from_the_storage_where_they_can() -> None:
    """From the second product on: the first finds the scales."""
    layer = torch.nn.Linear(32, 48)
    asked: list[bool] = []

    class Stored(Dense):
        def fp8_codes(self, scale: Tensor, dtype: torch.dtype, turn: bool, out: Tensor | None = None) -> Tensor:
            asked.append(turn)
            codes, own = fp8_rows(self.weight(dtype))
            assert torch.equal(own, scale)
            codes = codes.t().contiguous() if turn else codes
            return codes if out is None else out.copy_(codes)

    plain, weight = InFp8(Dense(layer)), InFp8(Stored(layer))
    x, dy = torch.randn(7, 32), torch.randn(7, 48)
    for _ in range(2):
        assert torch.equal(weight.product(x, {}), plain.product(x, {}))
        assert torch.equal(weight.input_gradient(dy), plain.input_gradient(dy))
        summed, wanted = (one.summed_gradient([one], [dy, 3 * dy], 32) for one in (weight, plain))
        assert summed is not None and wanted is not None and torch.equal(summed, wanted)
    assert asked == [True, True, True, False, True, True, True]


@pytest.mark.parametrize("base", ["nf4", "none"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_the_gradient_through_several_weights_is_one_product(
    base: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as by themselves, however much larger one's is than the other's."""
    model = adapted(base)
    fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)
    q, k, v, *_ = weights_of(model)
    dense = [one._frozen.weight(torch.float32).clone() for one in (q, k, v)]
    torch.manual_seed(1)
    dys = [torch.randn(40, len(one)) * factor for one, factor in zip(dense, (1.0, size, 1.0), strict=True)]
    exact = sum(dy.double() @ one.double() for dy, one in zip(dys, dense, strict=True))
    assert isinstance(exact, Tensor)
    products = 0
    kernel = __import__("qtrain.modules.fp8_weight", fromlist=["fp8_matmul"])
    original: Callable[..., Tensor] = kernel.fp8_matmul

    def counted(*args: Any) -> Tensor:
        nonlocal products
        products += 1
        return original(*args)

    monkeypatch.setattr(kernel, "fp8_matmul", counted)
    for _ in range(2):  # the second time with what was kept
        summed = q.summed_gradient([k, v], dys, 128)
        assert summed is not None and 0 < float((summed - exact).norm()) < 0.05 * float(exact.norm())
    assert products == 2
    apart = None
    for one, dy in zip((q, k, v), dys, strict=True):
        apart = one.input_gradient(dy, apart)
    assert apart is not None and (summed - apart).norm() < 0.05 * exact.norm()


def test_what_is_not_one_product() -> None:
    def weight(out: int) -> InFp8:
        return InFp8(Dense(torch.nn.Linear(32, out)))

    def refused(others: list[Any], outs: list[int]) -> bool:
        return weight(outs[0]).summed_gradient(others, [torch.randn(3, out) for out in outs], 32) is None

    assert not refused([weight(32)], [48, 32])
    assert refused([weight(40)], [48, 40])  # no multiple of 16: the other one may be
    assert refused([Dense(torch.nn.Linear(32, 32))], [48, 32])
    assert refused([weight(2**14)], [48, 2**14]) and not refused([weight(2**14 - 48)], [48, 2**14 - 48])


def test_blocks_take_one_product_for_q_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("nf4")
    fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)
    asked: list[int] = []
    original = InFp8.summed_gradient
    monkeypatch.setattr(
        InFp8,
        "summed_gradient",
        lambda own, others, dys, width: (asked.append(1 + len(others)), original(own, others, dys, width))[1],
    )
    found = step(model)
    assert asked == [2, 3, 2]  # gate and up; q, k and v; of the first layer nothing before them asks
    monkeypatch.setattr(InFp8, "summed_gradient", lambda *_: None)
    for name, one in step(model).items():
        assert (one - found[name]).norm() < 0.15 * one.norm()


def test_an_input_of_several_layers_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each block: q, k and v; o; gate and up; down. Nothing of it is held for the next."""
    seen: list[tuple[int, ...]] = []
    kernel = __import__("qtrain.modules.fp8_weight", fromlist=["fp8_rows"])
    original: Callable[..., object] = kernel.fp8_rows
    model = adapted("nf4")
    fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)
    found = weights_of(model)
    assert len(found) == 14 and all(isinstance(frozen, InFp8) for frozen in found)
    model(input_ids=IDS)  # finds the weights' scales
    monkeypatch.setattr(kernel, "fp8_rows", lambda x, *rest: seen.append(tuple(x.shape)) or original(x, *rest))
    monkeypatch.setattr(InFp8, "_weight", lambda own, dtype, turn: original(own._frozen.weight(dtype)))
    model(input_ids=IDS)
    assert seen == 2 * [(40, 128), (40, 128), (40, 128), (40, 192)]


@pytest.mark.parametrize(
    "words", [("method.name=qat",), ("method.fused_blocks=none",), ("method.dora=true",), ("method.base=int8",)]
)
def test_where_it_has_no_place(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="fp8"):
        load_recipe(None, "method.compute_dtype=fp8", *words)


def test_lora_layers_keep_their_names() -> None:
    model = adapted("none")
    before = set(model.state_dict())
    fuse_blocks(model.get_base_model(), nullcontext, "auto", fp8=True)
    assert set(model.state_dict()) == before and any(isinstance(m, LoraLayer) for m in model.modules())
