"""The walk over the blocks, against the same computation by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OlmoConfig, OlmoForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from qtrain.errors import DataError, ModelError
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.ptq.balance import Balancing
from qtrain.ptq.config import RtnSection, SmoothQuantSection
from qtrain.ptq.gptq import gptq_codes
from qtrain.ptq.smoothquant import SmoothQuant
from qtrain.ptq.start import Inputs, Start, Statistic
from qtrain.ptq.walk import quantize_blocks

SPEC = QuantSpec("int3", group_size=32)
GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Rounding(Start[RtnSection]):
    """Round to nearest; keeps what it was given."""

    def __init__(self, statistic: Statistic = "none") -> None:
        super().__init__(RtnSection())
        self.statistic = statistic  # type: ignore[misc]
        self.seen: list[Inputs] = []

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        self.seen.append(inputs)
        qparams = choose_qparams(weight, spec)
        return LinearRecord(quantize(weight, qparams, spec), *qparams, spec)


class Feedback(Start[RtnSection]):
    """GPTQ on the extremes' scales."""

    statistic: ClassVar[Statistic] = "hessian"

    def quantize(self, weight: Tensor, spec: QuantSpec, inputs: Inputs) -> LinearRecord:
        assert inputs.hessian is not None
        qparams = choose_qparams(weight, spec)
        return LinearRecord(gptq_codes(weight, qparams, inputs.hessian, spec), *qparams, spec)


def rewrite(name: str, linear: nn.Linear, record: LinearRecord) -> None:
    linear.weight.data.copy_(record.dequantize(linear.weight.dtype))


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 500, (2, length), generator=generator) for length in lengths]


def linears(model: nn.Module, *, head: bool = False) -> dict[str, QuantSpec]:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: SPEC for name in found if head or name != "lm_head"}


def observed(model: PreTrainedModel, name: str, text: Sequence[Tensor]) -> Tensor:
    """All tokens' inputs [tokens, in] of a layer, from whole forward passes."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: kept.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        for ids in text:
            model.eval()(ids)
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_walk_is_the_whole_model_run_anew_for_each_group(tiny_llama: LlamaForCausalLM, sequential: bool) -> None:
    text, start = rows(5, 17, 5), Feedback(RtnSection())
    by_hand = LlamaForCausalLM(tiny_llama.config)
    by_hand.load_state_dict(tiny_llama.state_dict())
    names = list(linears(by_hand))
    for k in range(2):
        found = [[n for n in names if n.startswith(f"model.layers.{k}.") and n.endswith(tuple(own))] for own in GROUPS]
        for group in found if sequential else [sum(found, [])]:
            inputs = {name: observed(by_hand, name, text) for name in group}
            for name, x in inputs.items():
                layer = by_hand.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                hessian = (x.T @ x / len(x)).float()
                rewrite(name, layer, start.quantize(layer.weight.detach(), SPEC, Inputs(hessian=hessian)))
    losses = quantize_blocks(tiny_llama, linears(tiny_llama), start, text, place=rewrite, sequential=sequential)
    assert {loss.name for loss in losses} == set(names)
    assert [loss.name for loss in losses][:3] == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    # Rounding may fall the other way on one weight of a tie; the outputs are those of the same codes.
    same = [
        torch.isclose(a, b).float().mean() for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True)
    ]
    assert min(same) > 0.999


def test_layers_that_differ_in_a_digit_alone_still_follow_each_other() -> None:
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=500, word_embed_proj_dim=32
    )
    model, text, start = OPTForCausalLM(config).eval(), rows(9), Rounding("hessian")
    names = [f"model.decoder.layers.0.{name}" for name in ("fc1", "fc2")]
    quantize_blocks(model, {name: QuantSpec("int2", group_size=16) for name in names}, start, text, place=rewrite)
    x, hessian = observed(model, names[1], text), start.seen[1].hessian  # fc1 is quantized by now
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-7)


def test_statistics_are_those_of_all_tokens_of_uneven_rows(tiny_llama: LlamaForCausalLM) -> None:
    text, start = rows(3, 21, 3, 8), Rounding("hessian")
    name = "model.layers.0.mlp.down_proj"
    x = observed(tiny_llama, name, text)
    quantize_blocks(tiny_llama, {name: SPEC}, start, text, place=rewrite)
    (inputs,) = start.seen
    expected = (x.square().mean(0), x.abs().amax(0), x.abs().mean(0), x.T @ x / len(x))
    found = (inputs.moment, inputs.largest, inputs.magnitude, inputs.hessian)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def test_moments_need_no_hessian(tiny_llama: LlamaForCausalLM) -> None:
    text, start = rows(9), Rounding("moments")
    losses = quantize_blocks(tiny_llama, linears(tiny_llama), start, text, place=rewrite)
    assert all(inputs.moment is not None and inputs.hessian is None for inputs in start.seen)
    assert {loss.of for loss in losses} == {"weight"}
    q, k, v, o = start.seen[:4]
    assert q.moment is k.moment is v.moment is not o.moment


def test_the_loss_is_relative_to_the_outputs_power(tiny_llama: LlamaForCausalLM) -> None:
    text, name = rows(9), "model.layers.1.self_attn.o_proj"
    x, weight = observed(tiny_llama, name, text), tiny_llama.get_parameter(f"{name}.weight").detach().double().clone()
    for start in (Rounding("hessian"), Rounding()):
        (loss,) = quantize_blocks(tiny_llama, {name: SPEC}, start, text, place=lambda *args: None)
        difference = Rounding().quantize(weight, SPEC, Inputs()).dequantize().double() - weight
        seen = x if start.statistic == "hessian" else torch.eye(64, dtype=torch.float64)
        expected = (seen @ difference.T).square().sum() / (seen @ weight.T).square().sum()
        assert loss.error == pytest.approx(float(expected), rel=1e-4)
        assert loss.of == ("output" if start.statistic == "hessian" else "weight")


class Kept(nn.Linear):
    """A layer of another kind, in the place of the one that was quantized."""


def test_layers_may_be_replaced_while_the_walk_goes_on(tiny_llama: LlamaForCausalLM) -> None:
    by_hand = LlamaForCausalLM(tiny_llama.config)
    by_hand.load_state_dict(tiny_llama.state_dict())

    def replace(name: str, linear: nn.Linear, record: LinearRecord) -> None:
        new = Kept(linear.in_features, linear.out_features, bias=False)
        new.weight.data.copy_(record.dequantize())
        linear.weight.data.fill_(float("nan"))  # nobody may run the old one
        tiny_llama.set_submodule(name, new)

    text = rows(7, 4)
    tiny_llama.train()
    tiny_llama.model.layers[0].mlp.eval()
    quantize_blocks(tiny_llama, linears(tiny_llama), Rounding("moments"), text, place=replace)
    quantize_blocks(by_hand, linears(by_hand), Rounding(), text, place=rewrite)
    assert all(isinstance(tiny_llama.get_submodule(name), Kept) for name in linears(tiny_llama))
    # Every module has the mode it had; new ones have the model's.
    assert tiny_llama.training and not tiny_llama.model.layers[0].mlp.training
    assert tiny_llama.get_submodule("model.layers.1.mlp.down_proj").training
    assert all(torch.equal(a, b) for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


class Packed(nn.Module):
    """A quantized layer that has no parameters."""

    def __init__(self, record: LinearRecord) -> None:
        super().__init__()
        self.register_buffer("levels", record.dequantize())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("levels").T


def test_blocks_may_be_left_without_parameters() -> None:
    config = OlmoConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=500
    )
    model, spec = OlmoForCausalLM(config).eval(), QuantSpec("int4", group_size=16)
    quantize_blocks(
        model,
        dict.fromkeys(linears(model), spec),
        SmoothQuant(SmoothQuantSection()),
        rows(9),
        place=lambda name, linear, record: model.set_submodule(name, Packed(record)),
    )
    assert not list(model.model.layers.parameters())
    assert bool(model(rows(9)[0]).logits.isfinite().all())


def test_without_statistics_no_text_is_wanted_and_nothing_runs(tiny_llama: LlamaForCausalLM) -> None:
    def no_run(*args: object) -> None:
        raise AssertionError("a forward pass")

    tiny_llama.model.register_forward_pre_hook(no_run)
    seen: list[int] = []

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        seen.append(total)
        return items

    losses = quantize_blocks(
        tiny_llama, linears(tiny_llama, head=True), Rounding(), [], place=rewrite, progress=progress
    )
    assert [loss.name for loss in losses] == list(linears(tiny_llama, head=True))
    assert seen == [15]
    assert all(loss.of == "weight" and 0 < loss.error < 0.2 and loss.seen for loss in losses)


def test_the_head_comes_last_on_what_the_quantized_decoder_gives(tiny_llama: LlamaForCausalLM) -> None:
    text, start = rows(7, 4), Rounding("hessian")
    losses = quantize_blocks(tiny_llama, linears(tiny_llama, head=True), start, text, place=rewrite)
    assert losses[-1].name == "lm_head" and losses[-1].of == "output"
    x = observed(tiny_llama, "lm_head", text)
    hessian = start.seen[-1].hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_blocks_without_a_layer_to_quantize_pass_the_text_on(tiny_llama: LlamaForCausalLM) -> None:
    name, start, shown = "model.layers.1.self_attn.q_proj", Rounding("moments"), []

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        for item in items:
            shown.append(total)
            yield item

    text = rows(7)
    x = observed(tiny_llama, name, text)
    quantize_blocks(tiny_llama, {name: SPEC}, start, text, place=rewrite, progress=progress)
    moment = start.seen[0].moment
    assert moment is not None
    torch.testing.assert_close(moment.double(), x.square().mean(0), rtol=1e-5, atol=0)
    assert shown == [1, 2, 2]  # rows, then blocks


def test_16_bit_models_under_autocast(tiny_llama: LlamaForCausalLM) -> None:
    start = Feedback(RtnSection())

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    losses = quantize_blocks(
        tiny_llama.bfloat16(), linears(tiny_llama), start, rows(40, 9), place=rewrite, context=context
    )
    assert tiny_llama.dtype == torch.bfloat16
    assert all(0 < loss.error < 0.05 for loss in losses)


class Experts(nn.Module):
    """Experts beside each other, each a linear of its own; tokens go to the first two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x)[..., :2].argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts[:3]):
            out[chosen == number] = expert(x[chosen == number])  # the third one is called with no token
        return out


def test_experts_that_no_token_reaches_are_told(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.set_submodule("model.layers.0.mlp", Experts())
    start, runs = Rounding("hessian"), 0

    def count(*args: object) -> None:
        nonlocal runs
        runs += 1

    tiny_llama.model.layers[0].register_forward_pre_hook(count)
    specs = {name: spec for name, spec in linears(tiny_llama).items() if ".0.mlp." in name}
    losses = quantize_blocks(tiny_llama, specs, start, rows(30), place=rewrite)
    assert {loss.name: loss.seen for loss in losses} == {
        f"model.layers.0.mlp.{name}": name not in ("experts.2", "experts.3")
        for name in ("gate", "experts.0", "experts.1", "experts.2", "experts.3")
    }
    unseen = start.seen[-1].hessian
    assert unseen is not None and torch.equal(unseen, torch.eye(64))
    # All experts at once: two runs to begin with, one to see who is called with what, one for the gate, one for them.
    assert runs == 5


def test_what_a_start_balances_is_what_is_quantized(tiny_llama: LlamaForCausalLM) -> None:
    class Doubling(Rounding, Balancing):
        """Every group's input halved, its columns doubled."""

        looks_at: ClassVar[Statistic] = "moments"

        def scale(self, weights: list[tuple[Tensor, QuantSpec]], inputs: Inputs, channel: Tensor) -> Tensor:
            assert inputs.moment is not None
            return torch.full((int(channel.max()) + 1,), 2.0)

    text, name = rows(7), "model.layers.0.self_attn.q_proj"
    x, weight = observed(tiny_llama, name, text), tiny_llama.get_parameter(f"{name}.weight").clone()
    start = Doubling("moments")
    placed: dict[str, Tensor] = {}
    quantize_blocks(
        tiny_llama,
        linears(tiny_llama),
        start,
        text,
        place=lambda name, linear, record: placed.update({name: linear.weight.detach().clone()}),
    )
    assert torch.equal(placed[name], 2 * weight)
    assert start.seen[0].moment is not None
    torch.testing.assert_close(start.seen[0].moment.double(), x.square().mean(0) / 4, rtol=1e-5, atol=0)
    balanced_v = placed["model.layers.0.self_attn.v_proj"]  # its columns doubled, its rows halved
    assert torch.equal(balanced_v, tiny_llama.get_parameter("model.layers.0.self_attn.v_proj.weight"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_prj", "did you mean 'model.layers.0.self_attn.q_proj'"),
        ("model.layers.0.mlp", "LlamaMLP"),
        ("model.embed_tokens", "linear layers are quantized"),
    ],
)
def test_names_that_are_no_linear_layer(tiny_llama: LlamaForCausalLM, name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        quantize_blocks(tiny_llama, {name: SPEC}, Rounding(), [], place=rewrite)


@pytest.mark.parametrize("text", [[], [torch.zeros(2, 0, dtype=torch.long)]])
def test_no_rows(tiny_llama: LlamaForCausalLM, text: list[Tensor]) -> None:
    with pytest.raises(DataError, match="no rows to calibrate on"):
        quantize_blocks(tiny_llama, linears(tiny_llama), Rounding("moments"), text, place=rewrite)


def test_rows_that_are_no_ids(tiny_llama: LlamaForCausalLM) -> None:
    for row in (torch.arange(9), torch.rand(2, 9)):
        with pytest.raises(DataError, match=r"token ids \[batch, tokens\]"):
            quantize_blocks(tiny_llama, linears(tiny_llama), Rounding("moments"), [row], place=rewrite)


@pytest.mark.parametrize("statistic", ["moments", "hessian"])
def test_inputs_that_are_not_finite_are_named(tiny_llama: LlamaForCausalLM, statistic: Statistic) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.down_proj"):
        specs = {name: spec for name, spec in linears(tiny_llama).items() if "up_proj" not in name}
        quantize_blocks(tiny_llama, specs, Rounding(statistic), rows(5), place=rewrite)


def test_weights_that_are_not_finite_are_named(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 128 rows hold NaN"):
        quantize_blocks(tiny_llama, linears(tiny_llama), Rounding(), [], place=rewrite)


def test_a_layer_outside_of_the_blocks_that_text_does_not_reach(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.tower = nn.Linear(64, 64)
    with pytest.raises(DataError, match="no calibration token reached 'tower'"):
        quantize_blocks(tiny_llama, {"tower": SPEC}, Rounding("moments"), rows(5), place=rewrite)


def test_states_that_are_not_finite_are_told_whatever_the_start_looks_at(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[0].mlp.down_proj.weight.data[3] = float("inf")
    specs = {name: spec for name, spec in linears(tiny_llama).items() if ".1." in name}
    with pytest.raises(DataError, match=r"output of 'model\.layers\.0' holds NaN or inf"):
        quantize_blocks(tiny_llama, specs, SmoothQuant(SmoothQuantSection()), rows(5), place=rewrite)
