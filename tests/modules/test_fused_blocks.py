"""Adapted decoders with and without blocks: the same numbers, fewer kept, and everything around them as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qtrain.kernels.lora_part import Made
from qtrain.kernels.nf4_dequantize import nf4_dequantize
from qtrain.modules import fused_blocks
from qtrain.modules.frozen_linear import quantize_base
from qtrain.modules.frozen_weight import FourBit, Workspace
from qtrain.modules.fused_blocks import fuse_blocks
from qtrain.modules.fused_layers import GatedMlp
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec
from qtrain.training.recompute import Recompute

CPU = torch.device("cpu")
BASES = ["nf4", "fp4", "int8", "packed", "none"]
IDS = torch.arange(3, 43).view(2, 20)
ALL = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21, transformers 5.23
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),  # once for each int8 product
]

Decoder = Callable[..., PreTrainedModel]


def context_of(dtype: torch.dtype) -> Callable[[], torch.autocast]:
    return partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def adapted(
    model: PreTrainedModel, base: str, compute: torch.dtype = torch.float32, device: torch.device = CPU, **keys: Any
) -> PeftModel:
    """Adapters of rank 4 with B off its start, in training."""
    model.requires_grad_(False)
    if base == "packed":
        pack(model)
    elif base != "none":
        quantize_base(model, base, double_quant=True, compute_dtype=compute, device=device)
    model.to(device)  # type: ignore[arg-type]
    torch.manual_seed(1)
    keys = {"r": 4, "lora_alpha": 8, "target_modules": rf".*\.({ALL})$", **keys}
    found = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
    assert isinstance(found, PeftModel)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return found.train()


def pack(model: PreTrainedModel) -> None:
    spec = QuantSpec("int4", False, "per_group", 16)
    for name, module in list(model.named_modules()):
        if re.fullmatch(rf".*\.({ALL})", name) and isinstance(module, nn.Linear):
            qparams = choose_qparams(module.weight.detach(), spec)
            codes = quantize(module.weight.detach(), qparams, spec)
            record = LinearRecord(codes, qparams.scale, qparams.zero_point, spec)
            model.set_submodule(name, PackedLinear.from_record(record, module.bias))


def plain(model: PeftModel) -> PreTrainedModel:
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner


def step(model: PeftModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits, and the gradient of every adapter."""
    model.zero_grad()
    with context_of(dtype)():
        logits = plain(model)(input_ids=IDS).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return {"logits": logits.detach(), **found}


def far(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Relative distances beyond ``tolerance``, by name."""
    assert {name: one.dtype for name, one in found.items()} == {name: own.dtype for name, own in wanted.items()}
    apart = {name: float((found[name] - own).norm() / own.norm().clamp(min=1e-30)) for name, own in wanted.items()}
    return {name: distance for name, distance in apart.items() if not distance <= tolerance}


@pytest.mark.parametrize("base", BASES)
def test_every_base_gives_in_fp32_what_peft_gives(base: str, decoder: Decoder) -> None:
    model = adapted(decoder("qwen2"), base)  # q, k and v have biases
    wanted = step(model)
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    over = {"none": "16 bits"}.get(base, base)
    assert words.startswith(f"QKV, O and MLP fused over {over} (2 layers)") and "as PEFT" not in words
    assert ("dequantized by bitsandbytes" in words) == (base in ("nf4", "fp4"))
    assert not far(step(model), wanted, 3e-6)  # a sum of 2 layers; one product is within 1e-6


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_under_autocast_within_the_rounding_of_bf16(base: str, storage: torch.dtype, decoder: Decoder) -> None:
    model = adapted(decoder("llama").to(storage), base, torch.bfloat16)
    wanted = step(model, torch.bfloat16)
    words = fuse_blocks(plain(model), context_of(torch.bfloat16), "auto")
    assert "QKV, O and MLP fused" in words and "as PEFT" not in words
    assert not far(step(model, torch.bfloat16), wanted, 0.04)


def test_fused_inside_the_autocast_of_training_and_where_another_device_is_the_default(decoder: Decoder) -> None:
    """As Lightning builds a model: autocast keeps casts until it ends; tensors are made on the strategy's device."""
    model = adapted(decoder("llama").to(torch.bfloat16), "nf4", torch.bfloat16)
    context = context_of(torch.bfloat16)
    inputs = fused_blocks.inputs_of
    with context(), pytest.MonkeyPatch.context() as patch:
        plain(model)(input_ids=IDS)  # with gradients: casts of the factors stay
        with torch.device("meta"):
            patch.setattr(fused_blocks, "inputs_of", partial(on_cpu, inputs))
            patch.setattr(fused_blocks, "_activation", lambda act: F.silu)
            words = fuse_blocks(plain(model), context, "auto")
    assert "QKV, O and MLP fused" in words and "as PEFT" not in words


def on_cpu(run: Callable[..., Any], *arguments: Any) -> Any:
    with torch.device("cpu"):
        return run(*arguments)


def test_an_mlp_without_a_module_for_its_activation(decoder: Decoder) -> None:
    """As liger-kernel's: models that are made after it was applied once have it."""
    model = adapted(decoder("llama"), "nf4")
    wanted = step(model)
    for layer in plain(model).model.layers:
        del layer.mlp.act_fn
        object.__setattr__(layer.mlp, "forward", partial(swiglu, layer.mlp))
    assert fuse_blocks(plain(model), context_of(torch.float32), "auto").startswith("QKV, O and MLP fused")
    assert not far(step(model), wanted, 3e-6)


def swiglu(mlp: Any, x: Tensor) -> Tensor:
    y: Tensor = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y


def test_each_linear_alone_is_within_1e_6(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "nf4")
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            x = torch.randn(3, 7, layer.in_features)
            found, wanted = layer(x), type(layer).forward(layer, x)
            assert found.requires_grad and (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qwen3", "QKV, O and MLP fused"),
        ("gemma2", "QKV, O and MLP fused"),  # another activation
        ("mistral", "QKV, O and MLP fused"),
    ],
)
def test_other_decoders(kind: str, words: str, decoder: Decoder) -> None:
    model = adapted(decoder(kind), "none")
    wanted = step(model)
    assert fuse_blocks(plain(model), context_of(torch.float32), "auto").startswith(words)
    assert not far(step(model), wanted, 5e-6)


def test_what_is_no_gated_mlp_is_taken_in_parts(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none")
    for layer in plain(model).model.layers:
        own = layer.mlp.forward
        object.__setattr__(layer.mlp, "forward", lambda x, own=own: own(x).clamp(-0.02, 0.02))
    wanted = step(model)
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert words.startswith(
        "QKV, O, gate+up and down fused over 16 bits (2 layers), MLP in parts for results that differ from a block's ("
    )
    assert not far(step(model), wanted, 3e-6)


def kept_bytes(model: PeftModel) -> int:
    """That autograd holds of a step, each memory once, beside the parameters."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain(model)(input_ids=IDS).logits.mean().backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def mlp_bytes(model: PeftModel, tokens: int) -> int:
    mlp = plain(model).model.layers[0].mlp
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(1, tokens, 64, requires_grad=True)
    seen.add(x.untyped_storage().data_ptr())
    found = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal found
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            found += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_less_is_kept_for_the_backward(dropout: float, decoder: Decoder) -> None:
    model = adapted(decoder("llama", intermediate_size=96), "nf4", lora_dropout=dropout)
    tokens, inner, low = 16, 96, 3 * 4
    before, whole = mlp_bytes(model, tokens), kept_bytes(model)
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    # Gate's and up's outputs, and of each adapter its low rank.
    assert mlp_bytes(model, tokens) == 4 * tokens * (2 * inner + low)
    assert before >= 4 * tokens * (4 * inner + low)  # f(g) and h too
    assert kept_bytes(model) < whole


@pytest.mark.parametrize("level", [False, True])
def test_recomputation_changes_nothing(level: bool, decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "nf4", lora_dropout=0.3)
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    found = []
    for recompute in (False, level):
        for layer in plain(model).model.layers:
            layer.gradient_checkpointing = recompute
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        torch.manual_seed(4)
        found.append(step(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputation_ends_before_the_product_that_nothing_reads(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(decoder("llama"), "nf4")
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    multiplied: list[int] = []
    product = FourBit.product

    def counted(weight: FourBit, x: Tensor, made: Made) -> Tensor:
        multiplied.append(x.shape[-1])
        return product(weight, x, made)

    monkeypatch.setattr(FourBit, "product", counted)
    wide = plain(model).config.intermediate_size
    step(model)
    assert len(multiplied) == 2 * 7 and multiplied.count(wide) == 2
    multiplied.clear()
    Recompute(plain(model)).set("full")
    step(model)
    assert len(multiplied) == 2 * (7 + 6) and multiplied.count(wide) == 2  # down: once in each layer


def test_dropout_drops_in_training_alone_and_says_that_masks_are_shared(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none", lora_dropout=0.3)
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert "one dropout mask for layers that share an input" in words
    first, second = step(model)["logits"], step(model)["logits"]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(step(model)["logits"], step(model)["logits"])


def test_without_gradients_layers_run_as_peft_has_them(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "nf4").eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), tokens)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_names_files_and_copies_are_as_before(decoder: Decoder, tmp_path: Path) -> None:
    model = adapted(decoder("llama"), "none")
    names, before = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    after = model.state_dict()
    assert list(after) == names and all(torch.equal(after[name], before[name]) for name in names)
    wanted = step(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(decoder("llama"), tmp_path, is_trainable=True).train()
    assert not far(step(again), wanted, 3e-6)
    fuse_blocks(plain(again), context_of(torch.float32), "auto")
    assert torch.equal(step(again)["logits"], wanted["logits"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(step(twin)["logits"], wanted["logits"])  # it computes with its own


def test_merged_disabled_unloaded_and_watched_layers_fall_back(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none")
    with model.disable_adapter():
        base = plain(model)(input_ids=IDS).logits
    wanted = step(model)["logits"]
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    with model.disable_adapter():
        assert torch.equal(plain(model)(input_ids=IDS).logits, base)
    model.merge_adapter()
    assert torch.allclose(plain(model)(input_ids=IDS).logits, wanted, atol=1e-5)
    model.unmerge_adapter()
    seen: list[torch.Size] = []
    handles = []
    for layer in plain(model).model.layers:
        for part in (layer.mlp.down_proj, layer.self_attn.k_proj.lora_A["default"]):
            handles.append(part.register_forward_hook(lambda module, given, y: seen.append(y.shape)))
    assert torch.allclose(step(model)["logits"], wanted, atol=1e-5) and len(seen) == 4
    for handle in handles:
        handle.remove()
    assert torch.allclose(step(model)["logits"], wanted, atol=1e-5) and len(seen) == 4
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).logits, wanted, atol=1e-5)
    assert torch.allclose(model.unload()(input_ids=IDS).logits, base, atol=1e-5)


def hook(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None)


def other_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


CHANGES: list[tuple[str, Callable[[Any], None], list[str]]] = [
    ("mlp.down_proj", hook, ["model.layers.{}.mlp runs in parts: a hook watches"]),
    (
        "self_attn.k_proj.lora_A.default",
        hook,
        ["model.layers.{}.self_attn.q_proj runs as PEFT has it: a hook watches inside"],
    ),
    (
        "self_attn.v_proj",
        other_dropout,
        ["model.layers.{}.self_attn.q_proj runs as PEFT has it: layers of one block drop different shares"],
    ),
    (
        "mlp.up_proj",
        lambda layer: layer.enable_adapters(False),
        [
            "model.layers.{}.mlp runs in parts: its adapter is disabled",
            "model.layers.{}.mlp.gate_proj runs as PEFT has it: its adapter is disabled",
        ],
    ),
    (
        "self_attn.o_proj",
        lambda layer: setattr(layer.get_base_layer(), "compute_dtype", torch.float16),
        [
            "model.layers.{}.self_attn.o_proj runs as PEFT has it: products in torch.float32, and the base's are in "
            "torch.float16"
        ],
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), CHANGES, ids=[f"{one[0]} {n}" for n, one in enumerate(CHANGES)])
def test_what_no_longer_runs_fused_is_said_once_in_training(
    name: str, change: Callable[[Any], None], words: list[str], decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(decoder("llama"), "nf4")
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    step(model)
    for number in (1, 0):
        change(plain(model).get_submodule(f"model.layers.{number}.{name}"))
        model.eval()
        plain(model)(input_ids=IDS)
        model.train()
        with torch.no_grad():
            plain(model)(input_ids=IDS)
        assert len(caplog.messages) == (0 if number else len(words))
        for _ in range(2):
            plain(model)(input_ids=IDS).logits.sum().backward()
        assert caplog.messages == [f"{line.format(1)} (said once, of the first layer)" for line in words]
    caplog.clear()
    other = adapted(decoder("llama"), "nf4")
    fuse_blocks(plain(other), context_of(torch.float32), "auto")
    step(other)
    assert not caplog.messages
    change(plain(other).get_submodule(f"model.layers.0.{name}"))
    plain(other)(input_ids=IDS).logits.sum().backward()
    assert len(caplog.messages) == len(words)  # another model says it for itself


def test_another_input_for_each_is_computed_for_each(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none")
    fuse_blocks(plain(model), context_of(torch.float32), "auto")
    attention = plain(model).model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    one, other = torch.randn(1, 4, 64), torch.randn(1, 4, 64)

    def alone(layer: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = type(layer).forward(layer, x)
        return found

    assert torch.allclose(q(one), alone(q, one), atol=1e-5)
    assert torch.allclose(k(other), alone(k, other), atol=1e-5)
    assert torch.allclose(k(one), alone(k, one), atol=1e-5)
    q(one)
    one.mul_(2.0)  # written to in between
    assert torch.allclose(k(one), alone(k, one), atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, "as PEFT has them: 14 layers for DoRA"),
        ({"target_modules": ["q_proj", "v_proj"]}, "QV fused over 16 bits (2 layers)"),
        ({"target_modules": ["down_proj"], "use_rslora": True}, "down fused over 16 bits (2 layers)"),
        (
            {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "exclude_modules": ["1.self_attn.k_proj"]},
            "as PEFT has them: 3 layers for a bias in the adapter, or a transposed weight",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:UserWarning")  # PEFT: no merge then
def test_the_line_says_what_runs_and_what_does_not(keys: dict[str, Any], words: str, decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none", **keys)
    wanted = step(model)
    assert fuse_blocks(plain(model), context_of(torch.float32), "auto") == words
    assert not far(step(model), wanted, 3e-6)


def test_a_block_that_computes_otherwise_is_refused(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "none")

    class Doubled(type(plain(model).model.layers[0].self_attn.q_proj)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    for layer in plain(model).model.layers:
        layer.self_attn.o_proj.__class__ = Doubled
    wanted = step(model)
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert words.startswith("QKV and MLP fused") and words.endswith(
        "as PEFT has them: 2 layers for results that differ from a block's (y by 0.5 of its norm)"
    )
    assert not far(step(model), wanted, 3e-6)


def test_layers_are_judged_by_what_many_tokens_give(decoder: Decoder) -> None:
    """bitsandbytes multiplies few rows by a coarser kernel, which no training takes."""
    model = adapted(decoder("llama"), "none")

    class Coarse(type(plain(model).model.layers[0].self_attn.q_proj)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y * (1.1 if x.numel() // x.shape[-1] <= 32 else 1.0)

    for layer in plain(model).model.layers:
        layer.mlp.down_proj.__class__ = Coarse
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert words == "QKV, O and MLP fused over 16 bits (2 layers), SwiGLU plain"


def test_kernels_that_do_not_run_are_named(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("qtrain.kernels.lora_product.gated", broken)
    model = adapted(decoder("llama"), "none")
    wanted = step(model)
    words = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert words.startswith("QKV, O, gate+up and down fused") and words.endswith(
        "MLP in parts for kernels that do not run here (RuntimeError: Failed to find C compiler)"
    )
    assert not far(step(model), wanted, 3e-6)


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (8, ", adapters of shared inputs in the base's products"),
        (4, ", adapters of rank 4 by themselves: in the base's products are those of multiples of 8"),
    ],
)
def test_how_adapters_are_added_is_said_where_a_kernel_writes_the_weights(
    rank: int, words: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_blocks, "choose_dequantize", lambda device: (nf4_dequantize, "a kernel"))
    model = adapted(decoder("llama"), "nf4", r=rank)
    found = fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert words in found and found.count("adapters") == 1
    assert "adapters" not in fuse_blocks(plain(adapted(decoder("llama"), "none")), context_of(torch.float32), "auto")


def test_none_leaves_everything(decoder: Decoder) -> None:
    model = adapted(decoder("llama"), "nf4")
    assert fuse_blocks(plain(model), context_of(torch.float32), "none").endswith("(method.fused_blocks=none)")
    assert not any("forward" in vars(module) for module in model.modules())
    assert "needs a GPU" in fuse_blocks(plain(model), context_of(torch.float32), "auto")
    assert any(isinstance(vars(module).get("forward"), GatedMlp) for module in model.modules())


def test_the_workspace_is_one_memory_for_all_shapes() -> None:
    workspace = Workspace()
    first = workspace.take((4, 6), torch.float32, CPU)
    assert first.shape == (4, 6) and workspace.nbytes() == 96
    assert workspace.take((3, 5), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert workspace.take((5, 6), torch.float32, CPU).is_contiguous() and workspace.nbytes() == 120
    workspace.take((2, 2), torch.bfloat16, CPU)
    assert workspace.nbytes() == 128


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 8])  # beside a weight written anew there is room for multiples of eight
@pytest.mark.parametrize("base", BASES)
def test_on_a_gpu_within_the_rounding_of_bf16(base: str, rank: int, decoder: Decoder) -> None:
    """No farther from the gradients in fp32 than PEFT's layers are."""
    device = torch.device("cuda")
    context = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    found = adapted(decoder("llama", **sizes).to(torch.bfloat16), base, torch.bfloat16, device=device, r=rank)
    exact = adapted(decoder("llama", **sizes).to(torch.bfloat16).float(), base, device=device, r=rank)
    exact.load_state_dict({n: p.detach() for n, p in found.named_parameters() if "lora" in n}, strict=False)

    def outcome(model: PeftModel, training: Any) -> dict[str, Tensor]:
        model.zero_grad()
        with training():
            logits = plain(model)(input_ids=IDS.to(device)).logits
        logits.float().square().mean().backward()
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach().float(), **gradients}

    def away(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max(float((one[name] - own).norm() / own.norm()) for name, own in other.items())

    truth, wanted = outcome(exact, nullcontext), outcome(found, context)
    words = fuse_blocks(plain(found), context, "auto")
    assert "QKV, O and MLP fused" in words and "as PEFT" not in words
    assert ("a kernel in Triton" in words) == (base in ("nf4", "fp4"))
    first = outcome(found, context)
    # Where inputs are codes too, a number that bf16 rounds may fall to the next one: PEFT's own layers are 0.12 away.
    assert away(first, truth) <= 1.2 * away(wanted, truth) <= (0.2 if base == "int8" else 0.1)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):  # dense weights in another memory
        second = outcome(found, context)
    torch.cuda.synchronize()
    assert away(second, first) <= 1e-3
